"""The latest tokens of each row, which is what hashes of n-grams read."""

from __future__ import annotations

import torch


class History:
    """The latest `length` tokens of B rows; token 0, as hashes take it, where a row has fewer.

    One history serves all that hashes tokens of these rows, whatever the sizes of its n-grams, up to `length`.
    """

    def __init__(self, rows: int, length: int, device: torch.device):
        self.tokens = torch.zeros((rows, length), dtype=torch.int64, device=device)

    def add(self, tokens: torch.Tensor) -> torch.Tensor:
        """One more token [B] of every row; all of the history, int64 [B, length], oldest first."""
        self.tokens = torch.cat((self.tokens[:, 1:], tokens[:, None]), 1)
        return self.tokens

    def fill(self, row: int, tokens: torch.Tensor) -> None:
        """The tokens [n] of a row, in place of what it had."""
        length = self.tokens.shape[1]
        self.tokens[row] = 0
        self.tokens[row, max(0, length - len(tokens)) :] = tokens[-length:]

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.tokens = self.tokens[rows]
