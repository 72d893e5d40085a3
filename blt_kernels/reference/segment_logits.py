"""Entropies and patches of next-byte predictions, by definition."""

from __future__ import annotations

import torch

from ..layout import PatchLayout
from .entropy import entropy
from .segment import segment


def segment_logits(
    logits: torch.Tensor,
    threshold: float,
    *,
    rule: str = "threshold",
    delta: float | None = None,
    max_patch_length: int | None = None,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bos_patch: bool = True,
    capacity: int | None = None,
) -> tuple[torch.Tensor, PatchLayout]:
    entropies = entropy(logits)
    layout = segment(
        entropies,
        threshold,
        rule=rule,
        delta=delta,
        max_patch_length=max_patch_length,
        seq_lens=seq_lens,
        cu_seqlens=cu_seqlens,
        bos_patch=bos_patch,
        capacity=capacity,
    )
    return entropies, layout
