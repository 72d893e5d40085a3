"""A corpus: an ordered list of files, read as a stream of documents."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .._checks import check_int
from .errors import CorpusError, printable
from .files import DEFAULT_INCLUDE, CorpusFile, find_files
from .readers import read_records, split_document

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
Patterns = str | Iterable[str]

KEPT_MESSAGES = 20  # of what was skipped
_BLOCK = 256  # places that `Skipped` keeps in one integer


@dataclass
class Skipped:
    """What `on_error="skip"` has skipped: records, or all that follows in a file that cannot be read further. Each
    counts once, however often the corpus is read."""

    counts: Counter[str] = field(default_factory=Counter)  # by CorpusError.reason
    messages: list[str] = field(default_factory=list)  # the first few
    # The lines or rows of each file that were counted, a bit for each, so that millions of them fit in memory.
    _seen: dict[tuple[Path | None, int], int] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, error: CorpusError) -> None:
        place = error.line if error.line is not None else error.row if error.row is not None else 0
        block, bit = (error.path, place // _BLOCK), 1 << place % _BLOCK
        seen = self._seen.get(block, 0)
        if seen & bit:
            return
        self._seen[block] = seen | bit
        self.counts[error.reason] += 1
        if len(self.messages) < KEPT_MESSAGES:
            self.messages.append(str(error))

    def __str__(self) -> str:
        """Such as "2 json, 1 utf8; first: a.jsonl, line 3: not JSON (...)"; empty if nothing was skipped."""
        if not self.total:
            return ""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))
        return f"{counts}; first: {self.messages[0]}"


class Address(NamedTuple):
    """Where a document lies in a corpus."""

    file: int  # index in Corpus.files
    cursor: int  # from which reading comes to its record first
    piece: int  # which one of the pieces of the record


class Corpus:
    """Files in a fixed order, streamed as documents; iterating gives all documents (bytes, UTF-8) in that order.

    By its name a file is JSON lines (.jsonl, .ndjson: one record a line), Parquet (.parquet) or text (anything else:
    one document); text and JSON lines also as .gz, .xz or .zst. Empty documents are left out. A byte order mark at the
    start of a text file or of a line of JSON is no text and is dropped. Text files with NUL bytes or invalid UTF-8 are
    errors.

    Patterns are matched against the path relative to the directory in `paths`, and of a file in `paths` against its
    name. They are read as in a .gitignore file, but `*` also matches "/":

    - `test` is everything called test, at any depth; of a directory, all that is in it.
    - `test/` is the same, but only directories.
    - `*.py` is all such names, at any depth.
    - `test/*` has a slash and so is anchored: it is what is in the directory `test` at the top.
    - `a/b.txt` is this file, also as `/a/b.txt`.
    - `*/test/*` is what is in directories called test, at any depth, also at the top; so is `**/test/*`.

    A pattern of `include` with a wildcard selects files; to name directories with it, add "/" (`train*/`). In a
    directory, names that begin with a dot never take part.

    Args:
        paths: one path or several: files of any name, and directories, walked recursively and in sorted order. Links
            are followed. A file reached twice counts once.
        text_key: the key of JSON records, or the Parquet column, that holds the text.
        on_error: "raise": what cannot be read raises CorpusError with file, line (or row) and reason, when reached.
            "skip": it is counted in `skipped` and reading goes on with the next record, or, where a file cannot be
            read further, the next file. The documents before the fault are kept.
        include: glob patterns, one or several, of the files that directories contribute. By default these are
            DEFAULT_INCLUDE, in upper or lower case.
        exclude: glob patterns of files and directories to leave out. They win over `include`, over `paths`, and over
            other names (links) of the same file.
        max_document_bytes: longer documents come in pieces of at most this size (at least 4), cut after a line end or,
            where a line is longer, between characters; each piece is a document of its own. This bounds memory:
            reading holds one piece of a text file, one record of JSON lines, 32 rows of Parquet.

    Attributes:
        files: the files, in order.
        left_out: a LeftOut: how many files and directories were left out, why, and a few names.
        unmatched: the patterns that matched nothing, as pairs ("include" or "exclude", pattern). `remarks` has these
            and `left_out` as sentences.
        skipped: a Skipped: what reading has skipped so far.

    Raises:
        TypeError, ValueError: wrong arguments.
        CorpusError: a path is missing, or there are no files or no documents.
        OSError: reading needs more open files than the system allows, whatever `on_error` says.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        text_key: str = "text",
        on_error: str = "raise",
        include: Patterns = DEFAULT_INCLUDE,
        exclude: Patterns = (),
        max_document_bytes: int = 1 << 20,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"Corpus: on_error: expected 'raise' or 'skip', got {on_error!r}")
        if not isinstance(text_key, str):
            raise TypeError(f"Corpus: text_key: expected str, got {type(text_key).__name__}")
        check_int("Corpus", "max_document_bytes", max_document_bytes, 4)
        roots = _roots(paths)
        include, exclude = _patterns("include", include), _patterns("exclude", exclude)
        self.text_key = text_key
        self.on_error = on_error
        self.max_document_bytes = max_document_bytes
        self.skipped = Skipped()
        self.origin = ", ".join(map(printable, roots)) or "(no paths)"
        self.files, self.left_out, self.unmatched = find_files(
            roots, include, exclude, skip_unreadable=on_error == "skip"
        )
        if not self.files:
            patterns = f"include {', '.join(include)}" + (f"; exclude {', '.join(exclude)}" if exclude else "")
            detail = "; ".join([patterns, *self.remarks()])
            raise CorpusError(f"Corpus: no files in {self.origin} ({detail})", reason="empty")

    def remarks(self) -> list[str]:
        """One line about what was left out, if anything was, and one for each pattern that matched nothing."""
        lines = [f"left out: {self.left_out}"] if self.left_out.counts else []
        return lines + [f"{argument}: the pattern {pattern!r} matches nothing" for argument, pattern in self.unmatched]

    def read(self, index: int, start: int = 0) -> Iterator[tuple[int, list[bytes], int]]:
        """File `files[index]` from cursor `start` (or where its part begins): `(cursor, documents, taken)` for each
        record, `documents` being its pieces. Reading may be taken up again at `cursor`; `taken` of the bytes on disk
        are read. Errors as `on_error` says."""
        file = self.files[index]
        records = read_records(
            file.path,
            text_key=self.text_key,
            max_bytes=self.max_document_bytes,
            start=max(start, file.start),
            stop=file.stop,
        )
        for cursor, record, taken in records:
            if not isinstance(record, CorpusError):
                yield cursor, split_document(record, self.max_document_bytes), taken
            elif self.on_error == "raise":
                raise record
            else:
                self.skipped.add(record)

    def fetch(self, addresses: Iterable[Address]) -> dict[Address, bytes]:
        """The documents at `addresses`; one that is not there any more is left out. Each file is read once, from the
        first of its addresses to the last."""
        found = {}
        for index, in_file in groupby(sorted(addresses), key=lambda address: address.file):
            wanted: dict[int, list[Address]] = {}
            for address in in_file:
                wanted.setdefault(address.cursor, []).append(address)
            cursor, last = min(wanted), max(wanted)
            for following, pieces, _ in self.read(index, cursor):
                for address in wanted.get(cursor, ()):
                    if address.piece < len(pieces):
                        found[address] = pieces[address.piece]
                cursor = following
                if cursor > last:
                    break
        return found

    def __iter__(self) -> Iterator[bytes]:
        found = False
        for index in range(len(self.files)):
            for _, documents, _ in self.read(index):
                found = found or bool(documents)
                yield from documents
        if not found:
            raise self.no_documents()

    def no_documents(self) -> CorpusError:
        """The error for a corpus in which reading has found no document."""
        count = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        skipped = f"; skipped: {self.skipped}" if self.skipped.total else ""
        return CorpusError(f"no documents in {self.origin} ({count}{skipped})", reason="empty")

    def fingerprint(self) -> str:
        """16 hex digits that stand for what decides the documents and their order: names, sizes and parts of the
        files, and the arguments. The contents are not read for it."""
        settings = (self.text_key, self.on_error, self.max_document_bytes)
        files = [(f.name, f.size, f.start, f.stop) for f in self.files]
        return hashlib.sha256(repr((settings, files)).encode()).hexdigest()[:16]

    def with_files(self, files: Sequence[CorpusFile], **settings: int) -> Corpus:
        """The same corpus with other files (or another `max_document_bytes`), and nothing skipped yet."""
        other = object.__new__(Corpus)
        other.__dict__.update(self.__dict__, files=tuple(files), skipped=Skipped(), **settings)
        return other


def _roots(paths: Paths) -> list[Path]:
    try:
        return [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    except TypeError as error:
        raise TypeError(f"Corpus: paths: expected a path (str or PathLike) or several, got {paths!r}") from error


def _patterns(argument: str, patterns: Patterns) -> tuple[str, ...]:
    if isinstance(patterns, str):
        return (patterns,)
    if not isinstance(patterns, Iterable):
        raise TypeError(f"Corpus: {argument}: expected patterns (str), got {type(patterns).__name__}")
    return tuple(patterns)


def order_key(*parts: object) -> bytes:
    """A pseudo-random sorting key that depends on `parts` alone: the same in every process and library version."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
