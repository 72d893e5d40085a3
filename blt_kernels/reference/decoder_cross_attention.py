"""Bytes attend to the slots of the last finished patches, by definition."""

from __future__ import annotations

import torch

from ..layout import PatchLayout
from ._attention import attend, slot_sequences


def decoder_cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: PatchLayout,
    *,
    scale: float | None = None,
    window: int = 1,
) -> torch.Tensor:
    slots_per_patch = k.shape[1] // max(layout.capacity, 1)
    slot = torch.arange(layout.capacity, device=q.device)[None, None, :]  # [1, 1, C]
    visible = layout.visible_ids[:, :, None].long()  # [B, N, 1]
    sequence = slot_sequences(layout)
    same_sequence = sequence[slot] == sequence[visible.clamp(min=0)]
    in_window = (visible >= 0) & (slot <= visible) & (slot > visible - window)
    mask = same_sequence & in_window  # [B, N, C]
    return attend(q, k, v, mask.repeat_interleave(slots_per_patch, dim=2), scale)
