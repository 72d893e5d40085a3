"""Opens files as a stream of bytes, decompressed if the name ends in .gz, .xz or .zst.

The modules gzip and lzma of the standard library could do two of the three, but gzip refuses what gzip(1) accepts
after the last member, lzma silently ends at the padding that xz(1) puts between streams, and zstandard's stream
reader ends a truncated file without a word. The decompressors under them are used here instead, member by member.
"""

from __future__ import annotations

import io
import lzma
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from .._optional import optional
from .errors import printable

COMPRESSION = (".gz", ".xz", ".zst")
CHUNK_BYTES = 1 << 16
# Compressed bytes that are taken at a time: few, so that `bytes_read` also tells how far the reader of a small file is.
COMPRESSED_CHUNK_BYTES = 1 << 12
# The zstd decoder returns all that its input expands to, at worst 32 KiB for each byte: so it gets little at a time.
ZSTD_CHUNK_BYTES = 1 << 9
GZIP_MAGIC = b"\x1f\x8b"


class DamagedError(Exception):
    """The compressed data cannot be decompressed."""


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSION


def open_bytes(path: Path) -> BinaryIO:
    """The content of `path`, decompressed.

    Raises OSError here or later where the file cannot be read; reading raises DamagedError and MemoryError.
    Raises ImportError naming the file where zstandard is missing.
    """
    if not is_compressed(path):
        return open(path, "rb")
    return cast(BinaryIO, io.BufferedReader(_Chunks(path), CHUNK_BYTES))


def bytes_read(file: BinaryIO) -> int:
    """How much of a file that `open_bytes` has opened is read; of a compressed one in bytes on disk, buffers included.

    It depends only on how far the content is read, not on the calls that read it.
    """
    raw = getattr(file, "raw", None)
    return raw.taken if isinstance(raw, _Chunks) else file.tell()


def skip_bytes(file: BinaryIO, path: Path, count: int) -> None:
    """Moves `file`, just opened by `open_bytes(path)`, to byte `count`, or to its end."""
    if not is_compressed(path):
        file.seek(count)
        return
    while count > 0 and (data := file.read(min(CHUNK_BYTES, count))):
        count -= len(data)


class _Chunks(io.RawIOBase):
    """The content of a compressed file as a raw stream."""

    def __init__(self, path: Path):
        self._file = open(path, "rb")  # noqa: SIM115
        self._chunks = _decompress(self._file, path)
        self._rest = memoryview(b"")

    @property
    def taken(self) -> int:
        """Compressed bytes that were read."""
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _decompress(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The content of all members (gzip), streams (xz) or frames (zstd) of a file, one after the other."""
    suffix = path.suffix.lower()
    new_decoder, library_error = _decoder_of(suffix, path)
    chunk_bytes = ZSTD_CHUNK_BYTES if suffix == ".zst" else COMPRESSED_CHUNK_BYTES
    try:
        data = file.read(chunk_bytes)
        if not data:
            raise DamagedError("the file is empty")
        while data:
            decoder = new_decoder()
            while not decoder.eof:
                if not data and getattr(decoder, "needs_input", True):
                    data = file.read(chunk_bytes)
                    if not data:
                        raise DamagedError("the file ends too early")
                # Bounded output, so that a file which expands a thousand times is still streamed.
                yield decoder.decompress(data) if suffix == ".zst" else decoder.decompress(data, 4 * CHUNK_BYTES)
                data = getattr(decoder, "unconsumed_tail", b"")
            data = decoder.unused_data or file.read(chunk_bytes)
            if suffix != ".zst":
                data = _after_padding(data, file)
            if suffix == ".gz" and data and not data.startswith(GZIP_MAGIC):
                warnings.warn(f"{printable(path)}: what follows the gzip data is ignored", stacklevel=2)
                return
    except library_error as error:
        hint = ": it was made with a dictionary, which is not supported" if "Dictionary" in str(error) else ""
        raise DamagedError(f"{error}{hint}") from error


def _after_padding(data: bytes, file: BinaryIO) -> bytes:
    """What follows the zeros that may stand after a member: b"" at the end of the file, else two bytes or more."""
    while data and not (data := data.lstrip(b"\0")):
        data = file.read(CHUNK_BYTES)
    return data + file.read(1) if len(data) == 1 else data


def _decoder_of(suffix: str, path: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """A function that makes a decoder for one member, and the exception that the decoder raises."""
    if suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if suffix == ".xz":
        return lzma.LZMADecompressor, lzma.LZMAError
    zstandard = optional("zstandard", f"reading {printable(path)}")
    # By default windows of more than 128 MiB are refused. This limit admits all that `zstd --long=31` makes.
    widest = 1 << zstandard.WINDOWLOG_MAX
    return lambda: zstandard.ZstdDecompressor(max_window_size=widest).decompressobj(), zstandard.ZstdError
