"""decoder_cross_attention: a byte reads the slots of the last finished patch. Baselines in cross_attention.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from blt_kernels import PatchLayout, decoder_cross_attention, reference

from .cases import Case, Headline, Setting
from .cross_attention import Op, cases_for

HEADLINES: dict[str, Headline] = {"forward": "readme", "backward": "results"}


def gather(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
    """In plain PyTorch: every byte gathers the K key and value rows of its patch."""
    batch, _, heads, width = q.shape
    slots = k.shape[1] // layout.capacity
    ids = layout.visible_ids.long()
    row = torch.arange(batch, device=q.device)[:, None]
    k, v = (x.view(batch, layout.capacity, slots, heads, width)[row, ids.clamp(min=0)] for x in (k, v))
    scores = (q[:, :, None] * k).float().sum(-1) * width**-0.5  # [B, N, K, H]
    weights = scores.softmax(2) * (ids >= 0)[:, :, None, None]
    return (weights[..., None] * v).sum(2).to(q.dtype)


def cases(setting: Setting) -> Iterator[Case]:
    op = Op("decoder", decoder_cross_attention, reference.decoder_cross_attention, gather, HEADLINES)
    return cases_for(setting, op)
