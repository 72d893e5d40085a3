"""Entropies whose context begins anew with each line, as in the paper's run of 8B parameters.

A newline belongs to the line that it ends. So the entropy at a newline, which says how hard the first byte of the next
line is to guess, knows the line before it; and the entropy at that first byte knows this byte alone. BOS belongs to the
first line, EOS to the last. Only the entropy model reads by lines: the rules that make patches of entropies see the
whole document, and patches may span lines.
"""

from __future__ import annotations

import torch

from ..model import EntropyModel
from ..tokens import BYTE_OFFSET

NEWLINE_ID = ord("\n") + BYTE_OFFSET


def lines_of(tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Where the lines of a packed row start and end: int64 [L+1], L the lines of all sequences.

    Waits for the device, because L depends on the text.

    Args:
        tokens: int [1, N].
        cu_seqlens: int [S+1]: its sequences, each of which begins a line.
    """
    after = (tokens[0, : int(cu_seqlens[-1])] == NEWLINE_ID).nonzero().squeeze(1) + 1
    return torch.cat((after, cu_seqlens.to(after.dtype))).unique()


def entropies_of(
    model: EntropyModel,
    tokens: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    reset_at_newline: bool = False,
) -> torch.Tensor:
    """`model.entropies`; with `reset_at_newline`, as if each line were a sequence of its own.

    Args:
        tokens: int [B, N].
        cu_seqlens: [S+1], B = 1: the sequences of a packed row; None: each row is one.

    Returns:
        Nats, float32 [B, N]. After the last sequence they have no meaning.
    """
    if not reset_at_newline or tokens.numel() == 0:
        return model.entropies(tokens, cu_seqlens=cu_seqlens)
    row = tokens.reshape(1, -1)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, row.shape[1] + 1, tokens.shape[1], device=tokens.device)
    lines = lines_of(row, cu_seqlens)
    longest = int(lines.diff().max()) if len(lines) > 1 else None
    return model.entropies(row, cu_seqlens=lines, longest_sequence=longest).view_as(tokens)
