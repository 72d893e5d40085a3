"""A corpus: an ordered list of files, read as a stream of documents."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from .readers import COMPRESSION, CorpusError, read_records, split_document

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Patterns = str | Sequence[str]

# What a directory contributes when nothing else is asked for.
_STEMS = ("*.txt", "*.text", "*.md", "*.rst", "*.jsonl", "*.ndjson")
DEFAULT_INCLUDE = (*(stem + end for stem in _STEMS for end in ("", *COMPRESSION)), "*.parquet")
KEPT_MESSAGES = 20


@dataclass(frozen=True)
class CorpusFile:
    """A file, or the part of it from cursor `start` to before cursor `stop` (see `readers`)."""

    path: Path
    name: str  # relative to the directory it was found in, so the same on every machine
    size: int  # bytes on disk
    start: int = 0
    stop: int | None = None


@dataclass
class Skipped:
    """What `on_error="skip"` left out: records, or the unreadable rest of files. Reading again counts again."""

    counts: Counter[str] = field(default_factory=Counter)  # by CorpusError.reason
    messages: list[str] = field(default_factory=list)  # the first few, each once

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, error: CorpusError) -> None:
        self.counts[error.reason] += 1
        if len(self.messages) < KEPT_MESSAGES and str(error) not in self.messages:
            self.messages.append(str(error))


class Corpus:
    """Files in a fixed order, streamed as documents; iterating gives all documents (bytes, UTF-8) in that order.

    paths         one path or several: files of any name, and directories, walked recursively and in sorted order.
                  By name a file is JSON lines (.jsonl, .ndjson: one record a line), Parquet (.parquet) or text
                  (anything else: one document); text and JSON lines also as .gz, .xz or .zst. A file reached twice
                  counts once.
    text_key      the key of JSON records, or the Parquet column, that holds the text.
    on_error      "raise": what cannot be read raises CorpusError with file, line (or row) and reason, when reached.
                  "skip": it is counted in `skipped` and reading goes on with the next record, or, where a file
                  cannot be read further, the next file. The documents before the fault are kept.
    include       glob patterns (`*` also matches `/`) of the files that directories contribute. A pattern is matched
    exclude       against "/" + the path relative to the directory. Hidden files and directories never take part.
    max_document_bytes
                  longer documents come in pieces of at most this size (at least 4), cut after a line end or, where a
                  line is longer, between characters; each piece is a document of its own. This bounds memory:
                  reading holds one piece of a text file, one record of JSON lines, 32 rows of Parquet.

    Empty documents are left out. Text files with NUL bytes or invalid UTF-8 are errors. Raises TypeError/ValueError
    for bad arguments, CorpusError for a missing path and where there are no files or no documents.
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
        if not isinstance(max_document_bytes, int):
            raise TypeError(f"Corpus: max_document_bytes: expected int, got {type(max_document_bytes).__name__}")
        if max_document_bytes < 4:
            raise ValueError(f"Corpus: max_document_bytes: expected at least 4, got {max_document_bytes}")
        roots = [Path(p) for p in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
        include = (include,) if isinstance(include, str) else tuple(include)
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self.text_key = text_key
        self.on_error = on_error
        self.max_document_bytes = max_document_bytes
        self.skipped = Skipped()
        self.files = tuple(_find_files(roots, include, exclude))
        self.origin = ", ".join(map(str, roots)) or "(no paths)"
        if not self.files:
            patterns = f"include {', '.join(include)}" + (f"; exclude {', '.join(exclude)}" if exclude else "")
            raise CorpusError(f"Corpus: no files in {self.origin} ({patterns})", reason="empty")

    def read(self, index: int, start: int = 0) -> Iterator[tuple[int, list[bytes]]]:
        """File `files[index]` from cursor `start` (or where its part begins): `(cursor, documents)` for each record,
        `documents` being its pieces. Reading may be taken up again at `cursor`. Errors as `on_error` says."""
        file = self.files[index]
        records = read_records(
            file.path,
            text_key=self.text_key,
            max_bytes=self.max_document_bytes,
            start=max(start, file.start),
            stop=file.stop,
        )
        for cursor, record in records:
            if not isinstance(record, CorpusError):
                yield cursor, split_document(record, self.max_document_bytes)
            elif self.on_error == "raise":
                raise record
            else:
                self.skipped.add(record)

    def __iter__(self) -> Iterator[bytes]:
        found = False
        for index in range(len(self.files)):
            for _, documents in self.read(index):
                found = found or bool(documents)
                yield from documents
        if not found:
            raise self.no_documents()

    def no_documents(self) -> CorpusError:
        """The error for a corpus in which nothing was found."""
        skipped = f", {self.skipped.total} skipped: {self.skipped.messages[0]}" if self.skipped.total else ""
        return CorpusError(f"no documents in {self.origin} ({len(self.files)} files{skipped})", reason="empty")

    def fingerprint(self) -> str:
        """16 hex digits of what decides the documents and their order: names, sizes and parts of files, and the
        arguments. Not of the contents, which are never read for it."""
        settings = (self.text_key, self.on_error, self.max_document_bytes)
        files = [(f.name, f.size, f.start, f.stop) for f in self.files]
        return hashlib.sha256(repr((settings, files)).encode()).hexdigest()[:16]

    def with_files(self, files: Sequence[CorpusFile], **settings: int) -> Corpus:
        """The same corpus with other files (or another `max_document_bytes`), and nothing skipped yet."""
        other = object.__new__(Corpus)
        other.__dict__.update(self.__dict__, files=tuple(files), skipped=Skipped(), **settings)
        return other


def _find_files(roots: Sequence[Path], include: Sequence[str], exclude: Sequence[str]) -> Iterator[CorpusFile]:
    seen = set()
    for root in roots:
        if root.is_dir():
            found = _walk(root, include, exclude)
        elif root.exists():
            found = [(root, root.name)]
        else:
            raise CorpusError(f"Corpus: no such file or directory: {root}", reason="unreadable", path=root)
        for path, name in found:
            real = path.resolve()
            if real not in seen:
                seen.add(real)
                yield CorpusFile(path, name, path.stat().st_size)


def _walk(root: Path, include: Sequence[str], exclude: Sequence[str]) -> list[tuple[Path, str]]:
    def fail(error: OSError) -> None:
        path = Path(error.filename)
        raise CorpusError(f"{path}: cannot be read ({error.strerror})", reason="unreadable", path=path)

    found = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            name = path.relative_to(root).as_posix()
            wanted = any(fnmatchcase("/" + name, pattern) for pattern in include)
            if wanted and not any(fnmatchcase("/" + name, pattern) for pattern in exclude) and path.is_file():
                found.append((path, name))
    return sorted(found, key=lambda item: item[1])


def order_key(*parts: object) -> bytes:
    """A pseudo-random sorting key that depends on `parts` alone: the same in every process and library version."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
