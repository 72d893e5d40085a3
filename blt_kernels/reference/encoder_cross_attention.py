"""Patch slots attend to the bytes of their patch, by definition."""

from __future__ import annotations

import torch

from ..layout import PatchLayout
from ._attention import attend, slot_sequences


def encoder_cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: PatchLayout,
    *,
    scale: float | None = None,
    window: int = 1,
) -> torch.Tensor:
    slots_per_patch = q.shape[1] // max(layout.capacity, 1)
    slot = torch.arange(layout.capacity, device=q.device)[None, :, None]  # [1, C, 1]
    byte_patch = layout.patch_ids[:, None, :].long()  # [B, 1, N]
    sequence = slot_sequences(layout)
    same_sequence = sequence[slot] == sequence[byte_patch.clamp(min=0)]
    in_window = (byte_patch >= 0) & (byte_patch <= slot) & (byte_patch > slot - window)
    has_bytes = (byte_patch == slot).any(-1, keepdim=True)
    mask = same_sequence & in_window & has_bytes  # [B, C, N]
    return attend(q, k, v, mask.repeat_interleave(slots_per_patch, dim=1), scale)
