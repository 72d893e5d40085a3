"""The error of the data path, and how it names files."""

from __future__ import annotations

import os
from pathlib import Path


class CorpusError(ValueError):
    """Something in a corpus cannot be used.

    `path` names the file, `line` (from 1) or `row` (from 0, Parquet) the place, where there is one.
    `reason` is one of: unreadable, corrupt, binary, utf8, json, missing_text, not_text, too_long, empty.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "corrupt",
        path: Path | None = None,
        line: int | None = None,
        row: int | None = None,
    ):
        super().__init__(message)
        self.reason = reason
        self.path = path
        self.line = line
        self.row = row


def problem(reason: str, detail: str, path: Path, *, line: int | None = None, row: int | None = None) -> CorpusError:
    """A CorpusError about one place in a file; its message is one line that any terminal can print."""
    place = f", line {line}" if line is not None else f", row {row}" if row is not None else ""
    message = f"{printable(path)}{place}: {' '.join(detail.split())}"
    return CorpusError(message, reason=reason, path=path, line=line, row=row)


def printable(name: str | os.PathLike[str]) -> str:
    """A file name as one line of valid Unicode: bytes that are not UTF-8, line ends and the like are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def os_reason(error: OSError) -> str:
    """What the operating system says, without the number of the error and the name of the file."""
    return error.strerror or str(error)
