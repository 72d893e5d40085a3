"""Compressors to compare a byte model with, in bits per byte.

Bits per byte counts every byte of every document and nothing else, as `model.loss.bits_per_byte` does. Compressors
store no ends of documents, and a model's predictions of them are left out of its sum as well.

PPMd is the baseline that is built like a language model: an adaptive model of the byte after the last 8, with blending
of shorter contexts and an arithmetic coder (Shkarin 2002, variant H as in 7-zip).
"""

from __future__ import annotations

import lzma
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .._checks import fail_type, fail_value
from .._optional import optional

Text = bytes | Iterable[bytes]  # one document, or several

COMPRESSORS = ("gzip", "xz", "zstd", "ppmd")
# Packages of those that Python does not come with.
_PACKAGES = {"zstd": "zstandard", "ppmd": "pyppmd"}
# xz's preset for the pass over a dictionary. 30 MB of Python source take 30 s of a core, and no more at higher presets.
_XZ_PRESET = 6
# PPMd forgets everything when its memory is full: this holds what the largest dictionary of text needs. On 30 MB of
# Python source order 8 takes 6 s of a core and 0.4 GB, and reaches 1.37 bits per byte where order 6 reaches 1.48.
_PPMD_ORDER, _PPMD_MEMORY = 8, 1 << 30
# Of a larger dictionary the last 64 MiB are used: xz takes 11 times as much memory, and about 1 s of a core per MiB.
DICTIONARY_BYTES = 1 << 26


def compress_bits_per_byte(
    text: Text, *, dictionary: Text = b"", compressors: Sequence[str] = COMPRESSORS
) -> dict[str, float]:
    """Bits per byte that compressors reach on `text`, alone and, if there is a `dictionary`, given that text.

    Args:
        text: the held-out text; documents are joined as they are. It is held in memory.
        dictionary: text the compressor has seen before, as a rule the training text; the last 64 MiB of it count.
        compressors: which of "gzip", "xz", "zstd" and "ppmd". zstd needs the package zstandard and ppmd the package
            pyppmd; without it, a compressor is left out with a warning.

    Returns:
        Bits per byte by name. A name says what was run:
        - "gzip -9", "xz -9e", "zstd -19 --long", "ppmd -o8": the whole compressed file of `text` alone.
        - "... given training text": the bytes of output that `text` adds to the compressed dictionary, with a window
          that spans both. gzip reaches back 32 KiB, so its dictionary is the last 32 KiB (its name says so).
    """
    op = "compress_bits_per_byte"
    for name in compressors:
        if name not in COMPRESSORS:
            raise fail_value(op, "compressors", f"names out of {COMPRESSORS}", repr(name))
    data = b"".join(_documents(op, "text", text))
    if not data:
        raise fail_value(op, "text", "at least one byte", "none")
    seen, truncated = _tail(_documents(op, "dictionary", dictionary), DICTIONARY_BYTES)
    given = f"given the last {DICTIONARY_BYTES >> 20} MiB of the training text" if truncated else "given training text"

    sizes: dict[str, int] = {}
    if "gzip" in compressors:
        sizes["gzip -9"] = _gzip(data, b"")
        if seen:
            sizes["gzip -9 given training text (last 32 KiB)"] = _gzip(data, seen[-(1 << 15) :])
    if "xz" in compressors:
        sizes["xz -9e"] = _xz(data, b"", 9 | lzma.PRESET_EXTREME)
        if seen:
            sizes[f"xz -{_XZ_PRESET} {given}"] = _xz(data, seen, _XZ_PRESET)
    for name, title, compress in (("zstd", "zstd -19 --long", _zstd), ("ppmd", f"ppmd -o{_PPMD_ORDER}", _ppmd)):
        if name not in compressors:
            continue
        try:
            package = optional(_PACKAGES[name])
        except ImportError as error:
            warnings.warn(f"{name} is left out of the comparison: {error}", stacklevel=2)
            continue
        sizes[title] = compress(package, data, b"")
        if seen:
            sizes[f"{title} {given}"] = compress(package, data, seen)
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def _documents(op: str, argument: str, text: Text) -> Iterator[bytes]:
    for document in [text] if isinstance(text, bytes) else text:
        if not isinstance(document, bytes):
            raise fail_type(op, argument, "bytes or an iterable of bytes", f"an item of type {type(document).__name__}")
        yield document


def _tail(documents: Iterable[bytes], size: int) -> tuple[bytes, bool]:
    """The last `size` bytes, and whether there were more."""
    tail = bytearray()
    truncated = False
    for document in documents:
        tail += document
        if len(tail) > 2 * size:
            del tail[:-size]
            truncated = True
    return bytes(tail[-size:]), truncated or len(tail) > size


def _gzip(data: bytes, seen: bytes) -> int:
    # wbits 31 writes the file that `gzip -9` writes, but takes no dictionary; 15 is the same stream in a zlib frame.
    compressor = zlib.compressobj(9, wbits=15, zdict=seen) if seen else zlib.compressobj(9, wbits=31)
    return len(compressor.compress(data)) + len(compressor.flush())


def _xz(data: bytes, seen: bytes, preset: int) -> int:
    # Alone, the 64 MiB of xz -9; with a dictionary, room for that as well.
    window = max(4096, min(len(seen) + len(data), DICTIONARY_BYTES * (2 if seen else 1)))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": window}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters)
    packed = compressor.compress(seen) + compressor.compress(data) + compressor.flush()
    # Where in `packed` do the bytes of `data` begin? Asking the decoder, 16 bytes at a time, costs half a second;
    # compressing `seen` once more by itself would double the time.
    start = 0
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    remaining = len(seen)
    while remaining > 0:
        remaining -= len(decompressor.decompress(packed[start : start + 16]))
        start += 16
    return len(packed) - start


def _zstd(zstandard: Any, data: bytes, seen: bytes) -> int:
    window_log = min(max(10, (len(seen) + len(data) - 1).bit_length()), 27)  # 128 MiB, as --long has it
    parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=window_log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    if seen:
        compressor.compress(seen)
        compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return len(compressor.compress(data)) + len(compressor.flush())


def _ppmd(pyppmd: Any, data: bytes, seen: bytes) -> int:
    encoder = pyppmd.Ppmd7Encoder(_PPMD_ORDER, _PPMD_MEMORY)
    if seen:
        encoder.encode(seen)  # it holds up to 5 bytes back, which then count with `data`
    return len(encoder.encode(data)) + len(encoder.flush())
