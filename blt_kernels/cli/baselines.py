"""What a byte model is compared with, in the unit of its own metric: compressors and an n-gram model.

Bits per byte counts every byte of every document and nothing else: the sum of -log2 p(byte | the document's bytes
before it, starting from BOS) over the number of bytes. End-of-document symbols are neither predicted by the n-gram
model nor stored by the compressors, so a model that predicts EOS leaves those predictions out of its sum as well.
"""

from __future__ import annotations

import lzma
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .._checks import fail_type, fail_value

Text = bytes | Iterable[bytes]  # one document, or several

COMPRESSORS = ("gzip", "xz", "zstd")
# Of a larger dictionary the last 64 MiB are used: xz takes 11 times as much memory, and about 1 s of a core per MiB.
DICTIONARY_BYTES = 1 << 26


def compress_bits_per_byte(
    text: Text, *, dictionary: Text = b"", compressors: Sequence[str] = COMPRESSORS, preset: int = 6
) -> dict[str, float]:
    """Bits per byte that compressors reach on `text`, alone and, if there is a `dictionary`, given that text.

    Args:
        text: the held-out text; documents are joined as they are. It is held in memory.
        dictionary: text the compressor has seen before, as a rule the training text; the last 64 MiB of it count.
        compressors: which of "gzip", "xz" and "zstd". zstd needs the package zstandard; without it, it is left out
            with a warning.
        preset: xz's preset (0 to 9) for the pass over the dictionary, which is where the time goes. 30 MB of Python
            source take about 5, 9, 18, 30 s of a core at 1, 2, 4, 6 and no more beyond 6; zstd -19 takes 27 s.

    Returns:
        Bits per byte by name. A name says what was run:
        - "gzip -9", "xz -9e", "zstd -19 --long": the whole compressed file of `text` alone.
        - "... given training text": the bytes of output that `text` adds to the compressed dictionary, with a window
          that spans both. gzip reaches back 32 KiB, so its dictionary is the last 32 KiB (its name says so).
    """
    op = "compress_bits_per_byte"
    for name in compressors:
        if name not in COMPRESSORS:
            raise fail_value(op, "compressors", f"names out of {COMPRESSORS}", repr(name))
    if not 0 <= preset <= 9:
        raise fail_value(op, "preset", "0 to 9", preset)
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
            sizes[f"xz -{preset} {given}"] = _xz(data, seen, preset)
    if "zstd" in compressors:
        try:
            sizes["zstd -19 --long"] = _zstd(data, b"")
            if seen:
                sizes[f"zstd -19 --long {given}"] = _zstd(data, seen)
        except ImportError:
            warnings.warn(
                "zstd is left out of the comparison: zstandard is missing (pip install 'blt_kernels[train]')",
                stacklevel=2,
            )
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


def _zstd(data: bytes, seen: bytes) -> int:
    import zstandard

    window_log = min(max(10, (len(seen) + len(data) - 1).bit_length()), 27)  # 128 MiB, as --long has it
    parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=window_log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    if seen:
        compressor.compress(seen)
        compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return len(compressor.compress(data)) + len(compressor.flush())


_BOS = 256
_SYMBOL_BITS = 9  # 256 bytes and BOS
_SYMBOL_MASK = (1 << _SYMBOL_BITS) - 1
_BLOCK = 1 << 22  # n-grams counted at a time: bounds the memory, and sorts faster than all at once

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Level:
    """p(s | context) = share(context s) + backoff(context) * p(s | shorter context); absent: share 0, backoff 1."""

    ngrams: _Ints  # sorted keys, symbol in the low bits
    shares: _Floats
    contexts: _Ints  # sorted keys
    backoffs: _Floats

    @staticmethod
    def build(ngrams: _Ints, counts: _Ints) -> _Level:
        contexts, first = np.unique(ngrams >> _SYMBOL_BITS, return_index=True)
        totals = np.add.reduceat(counts, first)
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        shares = (counts - discounts) / np.repeat(totals, np.diff(first, append=len(ngrams)))
        return _Level(ngrams, shares, contexts, np.add.reduceat(discounts, first) / totals)

    def probabilities(self, ngrams: _Ints, shorter: _Floats) -> _Floats:
        share = _look_up(self.ngrams, self.shares, ngrams, 0.0)
        return share + _look_up(self.contexts, self.backoffs, ngrams >> _SYMBOL_BITS, 1.0) * shorter


class NgramModel:
    """Byte n-gram model with interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999, section 3).

    A byte is predicted from the `order` bytes before it (order 3: 4-grams). Contexts do not cross documents; before a
    document's first byte stand BOS symbols. The probabilities over the 256 byte values sum to 1: EOS is not modelled.

    Why this smoothing: on Python source (30 MB counted, 1 MB held out, order 3) it reaches 2.100 bits per byte, one
    discount for all counts 2.118, Witten-Bell with continuation counts 2.102 and without them 2.150.
    """

    def __init__(self, order: int = 3) -> None:
        if not 0 <= order <= 6:  # 7 symbols of 9 bits fit one int64 key
            raise fail_value("NgramModel", "order", "0 to 6", order)
        self.order = order
        self._levels: list[_Level] = []  # by length of context

    def fit(self, documents: Text) -> NgramModel:
        """Counts the documents, replacing what was counted before. Memory grows with the distinct n-grams."""
        ngrams, counts = _count("NgramModel.fit", documents, self.order)
        levels = [_Level.build(ngrams, counts)]
        for length in reversed(range(self.order)):
            # Kneser-Ney: a shorter n-gram counts once for every different symbol that precedes it.
            ngrams, counts = np.unique(ngrams & _mask(length + 1), return_counts=True)
            levels.append(_Level.build(ngrams, counts))
        self._levels = levels[::-1]
        return self

    def bits_per_byte(self, documents: Text) -> float:
        """-log2 probability of the documents' bytes, per byte (see the head of this module for what is counted)."""
        ngrams, counts = _count("NgramModel.bits_per_byte", documents, self.order)
        return float(-(np.log2(self._probabilities(ngrams)) @ counts) / counts.sum())

    def distribution(self, prefix: bytes) -> _Floats:
        """The probabilities of the 256 values of the byte that follows `prefix`, the start of a document."""
        context = 0
        for symbol in [_BOS] * self.order + list(prefix):
            context = (context << _SYMBOL_BITS | symbol) & _mask(self.order)
        return self._probabilities(context << _SYMBOL_BITS | np.arange(256))

    def _probabilities(self, ngrams: _Ints) -> _Floats:
        if not self._levels:
            raise RuntimeError("NgramModel: fit it before asking for probabilities")
        result = np.full(len(ngrams), 1 / 256)
        for length, level in enumerate(self._levels):
            result = level.probabilities(ngrams & _mask(length + 1), result)
        return result


def _mask(symbols: int) -> int:
    return (1 << _SYMBOL_BITS * symbols) - 1


def _look_up(keys: _Ints, values: _Floats, wanted: _Ints, default: float) -> _Floats:
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], default)


def _discounts(counts: _Ints) -> _Floats:
    """What is taken from counts of 0, 1, 2 and 3 or more, estimated from the number of n-grams seen 1 to 4 times."""
    n1, n2, n3, n4 = (float((counts == c).sum()) for c in (1, 2, 3, 4))
    single = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
    if n1 and n2 and n3:
        modified = np.array([0, 1 - 2 * single * n2 / n1, 2 - 3 * single * n3 / n2, 3 - 4 * single * n4 / n3])
        if np.all(modified[1:] > 0):  # not so where small counts are rare: one discount for all is then the estimate
            return modified
    return np.array([0, single, single, single])


def _count(op: str, documents: Text, order: int) -> tuple[_Ints, _Ints]:
    """The distinct n-grams (context of `order` symbols, byte) as sorted keys, and how often each occurs."""
    ngrams = counts = np.empty(0, np.int64)
    for symbols in _symbol_blocks(_documents(op, "documents", documents), order):
        for start in range(0, len(symbols) - order, _BLOCK):
            block = symbols[start : start + _BLOCK + order].astype(np.int64)
            size = len(block) - order
            keys = np.zeros(size, np.int64)
            for i in range(order + 1):
                keys = keys << _SYMBOL_BITS | block[i : i + size]
            keys, new = np.unique(keys[(keys & _SYMBOL_MASK) != _BOS], return_counts=True)
            ngrams, owner = np.unique(np.concatenate((ngrams, keys)), return_inverse=True)
            counts = np.bincount(owner, weights=np.concatenate((counts, new))).astype(np.int64)
    if not len(ngrams):
        raise fail_value(op, "documents", "at least one byte", "none")
    return ngrams, counts


def _symbol_blocks(documents: Iterable[bytes], order: int) -> Iterator[npt.NDArray[np.uint16]]:
    """Whole documents, each with `order` BOS symbols before it, joined to blocks of _BLOCK symbols or more."""
    bos = np.full(order, _BOS, np.uint16)
    parts: list[npt.NDArray[np.uint16]] = []
    size = 0
    for document in documents:
        parts += [bos, np.frombuffer(document, np.uint8).astype(np.uint16)]
        size += order + len(document)
        if size >= _BLOCK:
            yield np.concatenate(parts)
            parts, size = [], 0
    if parts:
        yield np.concatenate(parts)
