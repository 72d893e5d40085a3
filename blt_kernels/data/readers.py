"""Streams the records of one file: text, JSON lines or Parquet; text and JSON lines also compressed.

A reader yields `(cursor, record, taken)`. `cursor` is where the next record begins, and reading may start there again:
a byte offset in text, a line in JSON lines, a row in Parquet, all counted from 0. `record` is the text as UTF-8
bytes, or a CorpusError that says what is wrong with it; when nothing more of the file can be read, the error is the
last record. So a caller can refuse or skip, and a bad line does not end the file. `taken` says how far the reader is:
bytes of the file on disk, those that it has read ahead included; with an error it is 0.
"""

from __future__ import annotations

import codecs
import errno
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from .._optional import optional
from .compression import CHUNK_BYTES, COMPRESSION, DamagedError, bytes_read, open_bytes, skip_bytes
from .errors import CorpusError, os_reason, printable, problem

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
MAX_LINE_BYTES = 1 << 28  # a longer line of JSON is an error, so that a file without newlines is not read whole
MAX_KEY_CHARACTERS = 60  # of a key that an error message shows
PARQUET_BATCH_ROWS = 32
BOM = codecs.BOM_UTF8
# The mark of UTF-32 begins with that of UTF-16, so it is looked for first.
OTHER_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32 (little-endian)",
    codecs.BOM_UTF32_BE: "UTF-32 (big-endian)",
    codecs.BOM_UTF16_LE: "UTF-16 (little-endian)",
    codecs.BOM_UTF16_BE: "UTF-16 (big-endian)",
}

Records = Iterator[tuple[int, "bytes | CorpusError", int]]


def kind_of(path: Path) -> str:
    """The kind of a file, "json", "parquet" or "text": its name without a compression suffix decides."""
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

    If all of them do not fit, the piece ends after the last whole line, or, where one line does not fit, after the
    last whole UTF-8 character.
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


def _file_error(error: Exception, path: Path, line: int | None = None) -> CorpusError:
    """The CorpusError for an exception out of opening, reading or decompressing; other exceptions are raised.

    That no more files can be opened is no fault of this one, and to skip it would lose good text.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise error
    if isinstance(error, DamagedError):
        return problem("corrupt", f"cannot be decompressed ({error})", path, line=line)
    if isinstance(error, OSError):
        return problem("unreadable", f"cannot be read ({os_reason(error)})", path, line=line)
    if isinstance(error, MemoryError):
        return problem("too_long", "there is not enough memory to read it", path, line=line)
    raise error


def _check_encoding(head: bytes, path: Path) -> CorpusError | None:
    """Refuses a file whose first bytes are the byte order mark of an encoding other than UTF-8."""
    for mark, encoding in OTHER_BOMS.items():
        if head.startswith(mark):
            detail = f"not UTF-8: the byte order mark at its start says {encoding}; convert it to UTF-8"
            return problem("utf8", detail, path, line=1)
    return None


def _read_text(path: Path, max_bytes: int, start: int, stop: int | None) -> Records:
    offset, rest = start, b""
    try:
        with closing(open_bytes(path)) as file:
            skip_bytes(file, path, start)
            if start == 0:
                head = file.read(4)
                if error := _check_encoding(head, path):
                    yield offset, error, 0
                    return
                rest = head[:stop].removeprefix(BOM)
                offset = len(BOM) if head.startswith(BOM) else 0
            while True:
                # One byte more than a piece holds, to see whether anything, and what, follows.
                wanted = max_bytes + 1 if stop is None else min(max_bytes + 1, stop - offset)
                rest += file.read(max(0, wanted - len(rest)))
                if not rest:
                    return
                piece = rest[: piece_length(rest, max_bytes)]
                rest = rest[len(piece) :]
                error = _check_text(piece, path, offset)
                offset += len(piece)
                yield offset, error or piece, bytes_read(file)
                if error:
                    return
    except Exception as error:
        yield offset, _file_error(error, path), 0


def _check_text(piece: bytes, path: Path, offset: int) -> CorpusError | None:
    nul = piece.find(b"\0")
    if nul >= 0:
        line = _line_at(path, offset + nul)
        return problem("binary", f"a NUL byte (offset {offset + nul}): not a text file", path, line=line)
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        detail = f"not UTF-8: byte 0x{piece[error.start]:02x} at offset {place} ({error.reason})"
        return problem("utf8", detail, path, line=_line_at(path, place))
    return None


def _line_at(path: Path, offset: int) -> int:
    """The line, from 1, of byte `offset`: counted anew, for an error only."""
    lines = 1
    with closing(open_bytes(path)) as file:
        while offset > 0 and (data := file.read(min(CHUNK_BYTES, offset))):
            lines += data.count(b"\n")
            offset -= len(data)
    return lines


def _read_json_lines(path: Path, text_key: str, start: int, stop: int | None) -> Records:
    number = 0  # lines read so far: while a line is handled, its number from 1
    try:
        with closing(open_bytes(path)) as file:
            while (stop is None or number < stop) and (line := file.readline(MAX_LINE_BYTES + 1)):
                number += 1
                if number == 1 and (error := _check_encoding(line, path)):
                    yield number, error, 0
                    return
                too_long = len(line) > MAX_LINE_BYTES
                while too_long and line and not line.endswith(b"\n"):
                    line = file.readline(CHUNK_BYTES)
                if number <= start:
                    continue
                # A mark also begins a later line where files were joined, and there it is no text either.
                line = line.removeprefix(BOM)
                if too_long:
                    detail = f"a line of more than {MAX_LINE_BYTES} bytes"
                    yield number, problem("too_long", detail, path, line=number), 0
                elif line.strip():
                    yield number, _parse_json_line(line, path, number, text_key), bytes_read(file)
    except Exception as error:
        yield number, _file_error(error, path, number + 1), 0


# Numbers are not looked at, so they are not converted either: json refuses integers of more than 4300 digits.
_JSON = json.JSONDecoder(parse_int=lambda digits: 0)


def _parse_json_line(line: bytes, path: Path, number: int, text_key: str) -> bytes | CorpusError:
    try:
        record = _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        detail = f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1} ({error.reason})"
        return problem("utf8", detail, path, line=number)
    except json.JSONDecodeError as error:
        return problem("json", f"not JSON ({error.msg} at column {error.pos + 1})", path, line=number)
    except RecursionError:
        return problem("json", "not JSON that can be read (too deeply nested)", path, line=number)
    if not isinstance(record, dict):
        detail = f"expected a JSON object, got {_json_type(record)}"
        return problem("missing_text", detail, path, line=number)
    if text_key not in record:
        detail = f"no key {text_key!r} (keys: {_some(list(record))})"
        return problem("missing_text", detail, path, line=number)
    text = record[text_key]
    if not isinstance(text, str):
        detail = f"key {text_key!r}: expected a string, got {_json_type(text)}"
        return problem("not_text", detail, path, line=number)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"key {text_key!r}: not UTF-8: a lone surrogate at character {error.start}"
        return problem("utf8", detail, path, line=number)


def _json_type(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _some(names: list[str]) -> str:
    """The first few keys or columns, for an error message."""
    shown = [repr(name[:MAX_KEY_CHARACTERS]) + "..." * (len(name) > MAX_KEY_CHARACTERS) for name in names[:8]]
    return ", ".join(shown) + ", ..." * (len(names) > 8) or "none"


def _read_parquet(path: Path, text_key: str, start: int, stop: int | None) -> Records:
    pa = optional("pyarrow", f"reading {printable(path)}")
    pq = optional("pyarrow.parquet", f"reading {printable(path)}")
    row = 0
    try:
        size = path.stat().st_size
        # Buffered pages, so that a row group larger than memory is still streamed.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            schema = file.schema_arrow
            columns = schema.names.count(text_key)
            if columns != 1:
                found = "several columns" if columns else "no column"
                detail = f"{found} {text_key!r} (columns: {_some(schema.names)})"
                yield 0, problem("missing_text", detail, path), 0
                return
            kind = schema.field(text_key).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                detail = f"column {text_key!r}: expected strings, got {kind}"
                yield 0, problem("not_text", detail, path), 0
                return
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= start:  # the group need not be read
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
                            taken = size * row // max(1, file.metadata.num_rows)
                            yield row, _check_parquet(value, path, row - 1, text_key), taken
            if row != file.metadata.num_rows:  # pyarrow does not check it
                detail = f"the Parquet data is damaged: it has {row} rows, and its index {file.metadata.num_rows}"
                yield row, problem("corrupt", detail, path, row=row), 0
    except Exception as error:  # pyarrow raises many kinds for damaged data, ValueError and KeyError among them
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            yield row, _file_error(error, path), 0
            return
        detail = f"the Parquet data is damaged, or this is no Parquet file ({error})"
        yield row, problem("corrupt", detail, path, row=row), 0


def _check_parquet(value: bytes | None, path: Path, row: int, text_key: str) -> bytes | CorpusError:
    if value is None:
        return problem("missing_text", f"column {text_key!r} is null", path, row=row)
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"column {text_key!r}: not UTF-8 at byte {error.start} ({error.reason})"
        return problem("utf8", detail, path, row=row)
    return value
