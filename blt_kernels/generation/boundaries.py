"""Where patches end, decided byte by byte: the rules of `segment`, `segment_spaces` and `segment_fixed`.

The decisions are made on the host, in NumPy: they take a few operations on one number a row, and the host has to know
them anyway, because the latent transformer runs for the rows whose patch closes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..tokens import BYTE_OFFSET
from ..training.patcher import PatcherConfig


def _space_like() -> NDArray[np.bool_]:
    """[256]: the bytes that are no ASCII letter or digit and no UTF-8 continuation byte."""
    letters = np.array([chr(byte).isascii() and chr(byte).isalnum() for byte in range(256)])
    continuation = np.arange(256) // 0x40 == 2
    return ~letters & ~continuation


_SPACE_LIKE = _space_like()


class Boundaries:
    """What each of B rows must remember to decide whether its next byte starts a patch.

    Attributes:
        positions: int64 [B], tokens that the row has seen.
        open_lengths: int64 [B], tokens of its patch that is not closed yet.
    """

    def __init__(self, config: PatcherConfig, rows: int):
        self.config = config
        self.positions = np.zeros(rows, np.int64)
        self.open_lengths = np.zeros(rows, np.int64)
        self._entropies = np.zeros(rows, np.float32)  # of the latest token
        self._was_space = np.zeros(rows, np.bool_)

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        for name in ("positions", "open_lengths", "_entropies", "_was_space"):
            setattr(self, name, getattr(self, name)[rows])

    def set_row(self, row: int, position: int, open_length: int, token: int, entropy: float) -> None:
        """The row has seen `position` tokens, of which `open_length` are in its open patch; the latest is `token`."""
        self.positions[row], self.open_lengths[row] = position, open_length
        self._entropies[row], self._was_space[row] = entropy, _is_space_like(np.array([token]))[0]

    def add(self, tokens: NDArray[np.int64], entropies: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Each row has seen one more token [B], whose prediction has this entropy in nats [B].

        Returns:
            bool [B]: the token ends its patch, because the next one, whatever it is, starts a patch.
        """
        closes = self._next_starts(tokens, entropies)
        self.open_lengths += 1
        if self.config.max_patch_length is not None:
            closes |= self.open_lengths == self.config.max_patch_length
        self.open_lengths[closes] = 0
        self.positions += 1
        self._entropies = entropies
        return closes

    def _next_starts(self, tokens: NDArray[np.int64], entropies: NDArray[np.float32]) -> NDArray[np.bool_]:
        config, position = self.config, self.positions
        if config.method == "fixed":
            assert config.patch_size is not None
            return position % config.patch_size == 0
        if config.method == "spaces":
            is_space, was_space = _is_space_like(tokens), self._was_space
            self._was_space = is_space
            return (is_space & ~was_space & (position >= 1)) | (tokens < BYTE_OFFSET) | (position == 0)
        assert config.threshold is not None
        threshold = np.float32(config.threshold)
        if config.rule == "threshold":
            return (entropies > threshold) | (position == 0)
        rise = entropies - self._entropies
        if config.rule == "monotonic":
            starts = rise > threshold
        else:
            assert config.delta is not None
            starts = (entropies > threshold) & (rise > np.float32(config.delta))
        # e[0] is never used, so the first difference is there at position 2, and the third token starts a patch.
        return starts | (position <= 1)


def _is_space_like(tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    return (tokens < BYTE_OFFSET) | _SPACE_LIKE[np.maximum(tokens - BYTE_OFFSET, 0)]
