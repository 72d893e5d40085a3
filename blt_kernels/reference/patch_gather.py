"""A row of its patch for each byte, by definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..layout import PatchLayout


def patch_gather(y: torch.Tensor, layout: PatchLayout, which: str = "visible") -> torch.Tensor:
    ids = (layout.visible_ids if which == "visible" else layout.patch_ids).long()
    ids = torch.where(ids < 0, layout.capacity, ids)  # no patch: one more row, of zeros
    rows = y if y.dtype == torch.float64 else y.float()  # so that the gradient of a row is summed in fp32
    return F.pad(rows, (0, 0, 0, 1)).gather(1, ids[:, :, None].expand(-1, -1, y.shape[2])).to(y.dtype)
