"""A byte-level BPE tokenizer, trained on the benchmark's own text, for `PackedBatches`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from blt_kernels._files import atomic_path
from blt_kernels.tokens import BOS_ID, BYTE_OFFSET, EOS_ID, VOCAB_SIZE


class BPETokenizer:
    """Tokens of a byte-level BPE, shifted by BYTE_OFFSET so that BOS, EOS and padding are what they are for bytes.

    It splits text as GPT-2's does before merging, loses nothing, and knows no special strings: a text that names a
    special token is text.

    Attributes:
        vocab_size: V, the four special tokens included.
        token_bytes: int64 [V], bytes of text that a token stands for.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = BYTE_OFFSET + tokenizer.get_vocab_size()
        self.token_bytes = np.zeros(self.vocab_size, np.int64)
        for text, index in tokenizer.get_vocab().items():
            self.token_bytes[BYTE_OFFSET + index] = len(text)  # the alphabet has one character a byte

    @staticmethod
    def train(documents: Iterable[bytes], vocab_size: int) -> BPETokenizer:
        """Learns merges from `documents` (UTF-8) until there are `vocab_size` tokens, or no pair is left.

        Raises:
            ValueError: vocab_size has no room for the 256 bytes and the 4 special tokens.
        """
        if vocab_size < VOCAB_SIZE:
            raise ValueError(f"BPETokenizer.train: vocab_size: expected at least {VOCAB_SIZE}, got {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()  # so that others can read the file that `save` writes
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - BYTE_OFFSET,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((document.decode() for document in documents), trainer)
        return BPETokenizer(tokenizer)

    def encode(self, document: bytes) -> NDArray[np.int64]:
        """int64 [n]: BOS, the text, EOS. Raises UnicodeDecodeError (a ValueError) where it is not UTF-8."""
        ids = self._tokenizer.encode(document.decode()).ids
        return np.array([BOS_ID, *(BYTE_OFFSET + i for i in ids), EOS_ID], np.int64)

    def save(self, path: Path) -> None:
        with atomic_path(path) as partial:
            self._tokenizer.save(str(partial))

    @staticmethod
    def load(path: Path) -> BPETokenizer:
        return BPETokenizer(Tokenizer.from_file(str(path)))
