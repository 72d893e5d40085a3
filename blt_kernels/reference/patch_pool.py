"""Reduction of each patch's bytes, by definition."""

from __future__ import annotations

import torch

from ..layout import PatchLayout


def patch_pool(x: torch.Tensor, layout: PatchLayout, reduce: str = "max") -> torch.Tensor:
    batch, _, width = x.shape
    capacity = layout.capacity
    acc = x if x.dtype == torch.float64 else x.float()
    slot = layout.patch_ids.long()
    nowhere = slot < 0
    slot = torch.where(nowhere, capacity, slot)  # bytes in no patch go to one more slot, dropped below
    acc = acc.masked_fill(nowhere[:, :, None], 0)  # and so does their gradient, NaN included
    if reduce in ("max", "min"):
        # The NaN is only what untouched slots hold: it equals nothing, so it takes no share of a tie's gradient.
        out = acc.new_full((batch, capacity + 1, width), float("nan"))
        index = slot[:, :, None].expand_as(acc)
        out = out.scatter_reduce(1, index, acc, "amax" if reduce == "max" else "amin", include_self=False)
    else:
        out = acc.new_zeros((batch, capacity + 1, width))
        out = out.scatter_add(1, slot[:, :, None].expand_as(acc), acc)
    count = layout.offsets.diff(dim=1)[:, :, None]  # [B, C, 1]
    out = out[:, :capacity]
    if reduce == "mean":
        out = out / count.clamp(min=1)
    return torch.where(count > 0, out, 0).to(x.dtype)
