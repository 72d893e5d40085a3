"""What the two cross-attentions share: softmax attention under a dense mask, by definition."""

from __future__ import annotations

import torch

from ..layout import PatchLayout


def slot_sequences(layout: PatchLayout) -> torch.Tensor:
    """[C + 1] The sequence that each slot of a row belongs to. In a padded batch every row is one sequence."""
    slots = torch.arange(layout.capacity + 1, device=layout.offsets.device, dtype=torch.int32)
    if layout.offsets.shape[0] != 1:
        return torch.zeros_like(slots)
    return torch.searchsorted(layout.cu_patches[1:], slots, right=True)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None) -> torch.Tensor:
    """q [B, Q, H, E], k and v [B, L, Hkv, E], mask [B, Q, L] -> [B, Q, H, E]; a row that may see nothing gives 0.

    In fp32 (fp64 for float64). The products are dense, so that NaN and infinity in one row of k or v reach all of q.
    """
    dtype = q.dtype
    q, k, v = (x if dtype == torch.float64 else x.float() for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    heads_per_key = q.shape[2] // max(k.shape[2], 1)
    k, v = (x.repeat_interleave(heads_per_key, dim=2) for x in (k, v))
    hidden = ~mask[:, None]  # [B, 1, Q, L]
    scores = torch.einsum("bqhe,blhe->bhql", q, k) * scale
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
    return torch.einsum("bhql,blhe->bqhe", weights, v).to(dtype)
