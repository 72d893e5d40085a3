"""Byte tokens of the Byte Latent Transformer: four special tokens, then byte b as token b + 4."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..tokens import BOS_ID, BYTE_OFFSET, EOS_ID, VOCAB_SIZE


def encode(text: str | bytes, *, bos: bool = True, eos: bool = True) -> NDArray[np.int64]:
    """The tokens of one document, int64 [n]: BOS, its bytes (a str as UTF-8) plus 4, EOS.

    Raises TypeError if `text` is neither str nor bytes, and UnicodeEncodeError (a ValueError) for a str with
    lone surrogates.
    """
    if isinstance(text, str):
        text = text.encode("utf-8")
    if not isinstance(text, (bytes, bytearray, memoryview)):
        raise TypeError(f"encode: text: expected str or bytes, got {type(text).__name__}")
    raw = np.frombuffer(text, np.uint8)
    tokens = np.empty(len(raw) + bos + eos, np.int64)
    np.add(raw, BYTE_OFFSET, out=tokens[int(bos) : int(bos) + len(raw)], dtype=np.int64)
    if bos:
        tokens[0] = BOS_ID
    if eos:
        tokens[-1] = EOS_ID
    return tokens


def decode(tokens: ArrayLike) -> bytes:
    """The bytes of `tokens` (integers, any shape, read in order); special tokens are left out.

    Raises TypeError for a non-integer dtype and ValueError for a token outside 0 .. 259.
    """
    array = np.asarray(tokens).reshape(-1)
    if array.size == 0:
        return b""
    if array.dtype.kind not in "iu":
        raise TypeError(f"decode: tokens: expected integers, got dtype {array.dtype}")
    if array.min() < 0 or array.max() >= VOCAB_SIZE:
        wrong = array[(array < 0) | (array >= VOCAB_SIZE)][0]
        raise ValueError(f"decode: tokens: expected values in 0 .. {VOCAB_SIZE - 1}, got {wrong}")
    return (array[array >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes()


class Tokenizer(Protocol):
    """From the bytes of a document to tokens; ids below BYTE_OFFSET have the meaning they have for bytes."""

    token_bytes: NDArray[np.int64]  # [V] bytes of text that a token stands for; 0 below BYTE_OFFSET

    def encode(self, document: bytes) -> NDArray[np.int64]:
        """int64 [n]: BOS, the text, EOS."""


class ByteTokenizer:
    """One token for each byte."""

    token_bytes = (np.arange(VOCAB_SIZE) >= BYTE_OFFSET).astype(np.int64)

    def encode(self, document: bytes) -> NDArray[np.int64]:
        return encode(document)
