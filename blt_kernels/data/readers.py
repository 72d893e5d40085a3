"""Streams the records of one file: text, JSON lines or Parquet; text and JSON lines also compressed.

A reader yields `(cursor, record)`. `cursor` is where the next record begins, and reading may start there again:
a byte offset in text, a line in JSON lines, a row in Parquet, all counted from 0. `record` is the text as UTF-8
bytes, or a CorpusError that says what is wrong with it; when nothing more of the file can be read, the error is the
last record. So a caller can refuse or skip, and a bad line does not end the file.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, cast

COMPRESSION = (".gz", ".xz", ".zst")
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
MAX_LINE_BYTES = 1 << 28  # a longer line of JSON is an error, so that a file without newlines is not read whole
CHUNK_BYTES = 1 << 16
PARQUET_BATCH_ROWS = 32


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


def _problem(reason: str, detail: str, path: Path, *, line: int | None = None, row: int | None = None) -> CorpusError:
    place = f", line {line}" if line is not None else f", row {row}" if row is not None else ""
    return CorpusError(f"{path}{place}: {detail}", reason=reason, path=path, line=line, row=row)


Records = Iterator[tuple[int, "bytes | CorpusError"]]


def kind_of(path: Path) -> str:
    """Either "json", "parquet" or "text", by the name alone; a compression suffix is looked through."""
    name = path.name.lower()
    if name.endswith(PARQUET):
        return "parquet"
    for suffix in COMPRESSION:
        name = name.removesuffix(suffix)
    return "json" if name.endswith(JSON_LINES) else "text"


def read_records(path: Path, *, text_key: str, max_bytes: int, start: int = 0, stop: int | None = None) -> Records:
    """The records of `path` from cursor `start` to before cursor `stop`.

    A text file is one record, or several if it is longer than `max_bytes` (see `piece_length`).
    Raises ImportError naming the package to install where an optional one is missing.
    """
    kind = kind_of(path)
    if kind == "parquet":
        return _read_parquet(path, text_key, start, stop)
    if kind == "json":
        return _read_json_lines(path, text_key, start, stop)
    return _read_text(path, max_bytes, start, stop)


def piece_length(data: bytes, max_bytes: int) -> int:
    """How many bytes of `data` go into one piece of at most `max_bytes` (at least 4).

    All if they fit; else up to the end of the last whole line; else, if the line is longer, of the last whole
    UTF-8 character.
    """
    if len(data) <= max_bytes:
        return len(data)
    newline = data.rfind(b"\n", 0, max_bytes)
    if newline >= 0:
        return newline + 1
    for length in range(max_bytes, max_bytes - 4, -1):
        if data[length] & 0xC0 != 0x80:
            return length
    return max_bytes  # not UTF-8: the caller's check will say so


def split_document(data: bytes, max_bytes: int) -> list[bytes]:
    """`data` in pieces of at most `max_bytes`; joined they are `data` again."""
    pieces = []
    begin = 0
    while begin < len(data):
        length = piece_length(data[begin : begin + max_bytes + 1], max_bytes)
        pieces.append(data[begin : begin + length])
        begin += length
    return pieces


def _optional(package: str, module: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package {package}: pip install {package}") from error


class _Chunks(io.RawIOBase):
    """An iterator of bytes as a raw stream."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _zstd_chunks(path: Path, zstandard: Any) -> Iterator[bytes]:
    # zstandard's own stream reader ends a truncated file without a word; frame by frame we can tell.
    frame = None
    with open(path, "rb") as file:
        while data := file.read(CHUNK_BYTES):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the file ends within a compressed frame")


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_Chunks(_zstd_chunks(path, _optional("zstandard", "zstandard", path)))))
    return open(path, "rb")


def _skip_bytes(file: BinaryIO, path: Path, count: int) -> None:
    if path.suffix.lower() not in COMPRESSION:
        file.seek(count)
        return
    while count > 0:
        data = file.read(min(CHUNK_BYTES, count))
        if not data:
            return
        count -= len(data)


def _file_error(error: Exception, path: Path, line: int | None = None) -> CorpusError:
    """The CorpusError for an exception out of opening, reading or decompressing."""
    known = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)
    if isinstance(error, known) or type(error).__name__ == "ZstdError":
        return _problem("corrupt", f"the compressed data is damaged or cut short ({error})", path, line=line)
    if isinstance(error, OSError):
        return _problem("unreadable", f"cannot be read ({error.strerror or error})", path, line=line)
    raise error


def _read_text(path: Path, max_bytes: int, start: int, stop: int | None) -> Records:
    offset, rest = start, b""
    try:
        with closing(_open(path)) as file:
            _skip_bytes(file, path, start)
            while True:
                # One byte more than a piece holds, to see whether anything, and what, follows.
                wanted = max_bytes + 1 if stop is None else min(max_bytes + 1, stop - offset)
                rest += file.read(wanted - len(rest))
                if not rest:
                    return
                piece = rest[: piece_length(rest, max_bytes)]
                rest = rest[len(piece) :]
                error = _check_text(piece, path, offset)
                offset += len(piece)
                yield offset, error or piece
                if error:
                    return
    except Exception as error:
        yield offset, _file_error(error, path)


def _check_text(piece: bytes, path: Path, offset: int) -> CorpusError | None:
    nul = piece.find(b"\0")
    if nul >= 0:
        line = _line_at(path, offset + nul)
        return _problem("binary", f"a NUL byte (offset {offset + nul}): not a text file", path, line=line)
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        detail = f"not UTF-8: byte 0x{piece[error.start]:02x} at offset {place} ({error.reason})"
        return _problem("utf8", detail, path, line=_line_at(path, place))
    return None


def _line_at(path: Path, offset: int) -> int:
    """The line, from 1, of byte `offset`: counted anew, for an error only."""
    lines = 1
    with closing(_open(path)) as file:
        while offset > 0 and (data := file.read(min(CHUNK_BYTES, offset))):
            lines += data.count(b"\n")
            offset -= len(data)
    return lines


def _read_json_lines(path: Path, text_key: str, start: int, stop: int | None) -> Records:
    number = 0  # lines read so far: while a line is handled, its number from 1
    try:
        with closing(_open(path)) as file:
            while (stop is None or number < stop) and (line := file.readline(MAX_LINE_BYTES + 1)):
                too_long = len(line) > MAX_LINE_BYTES
                number += 1
                while too_long and line and not line.endswith(b"\n"):
                    line = file.readline(CHUNK_BYTES)
                if number <= start:
                    continue
                if too_long:
                    detail = f"a line of more than {MAX_LINE_BYTES} bytes"
                    yield number, _problem("too_long", detail, path, line=number)
                elif not line.isspace():
                    yield number, _parse_json_line(line, path, number, text_key)
    except Exception as error:
        yield number, _file_error(error, path, number + 1)


def _parse_json_line(line: bytes, path: Path, number: int, text_key: str) -> bytes | CorpusError:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        detail = f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1} ({error.reason})"
        return _problem("utf8", detail, path, line=number)
    except (ValueError, RecursionError) as error:
        return _problem("json", f"not JSON ({error})", path, line=number)
    if not isinstance(record, dict):
        detail = f"expected a JSON object, got {type(record).__name__}"
        return _problem("missing_text", detail, path, line=number)
    if text_key not in record:
        found = ", ".join(repr(key) for key in list(record)[:8]) or "none"
        return _problem("missing_text", f"no key {text_key!r} (keys: {found})", path, line=number)
    text = record[text_key]
    if not isinstance(text, str):
        detail = f"key {text_key!r}: expected a string, got {type(text).__name__}"
        return _problem("not_text", detail, path, line=number)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"key {text_key!r}: not UTF-8: a lone surrogate at character {error.start}"
        return _problem("utf8", detail, path, line=number)


def _read_parquet(path: Path, text_key: str, start: int, stop: int | None) -> Records:
    pa = _optional("pyarrow", "pyarrow", path)
    pq = _optional("pyarrow", "pyarrow.parquet", path)
    row = 0
    try:
        # Buffered pages, so that a row group larger than memory is still streamed.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            schema = file.schema_arrow
            if text_key not in schema.names:
                detail = f"no column {text_key!r} (columns: {', '.join(map(repr, schema.names[:8]))})"
                yield 0, _problem("missing_text", detail, path)
                return
            kind = schema.field(text_key).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                detail = f"column {text_key!r}: expected strings, got {kind}"
                yield 0, _problem("not_text", detail, path)
                return
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= start:  # not even read
                    row += rows
                    continue
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group], columns=[text_key]):
                    column = batch.column(0)
                    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
                    for value in column.cast(pa.large_binary()).to_pylist():
                        if stop is not None and row >= stop:
                            return
                        row += 1
                        if row > start:
                            yield row, _check_parquet(value, path, row - 1, text_key)
    except (pa.ArrowException, OSError) as error:
        detail = f"the Parquet data is damaged, or this is no Parquet file ({error})"
        yield row, _problem("corrupt", detail, path, row=row)


def _check_parquet(value: bytes | None, path: Path, row: int, text_key: str) -> bytes | CorpusError:
    if value is None:
        return _problem("missing_text", f"column {text_key!r} is null", path, row=row)
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"column {text_key!r}: not UTF-8 at byte {error.start} ({error.reason})"
        return _problem("utf8", detail, path, row=row)
    return value
