"""encoder_cross_attention: the slots of a patch read its bytes. Baselines in cross_attention.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from blt_kernels import PatchLayout, encoder_cross_attention, reference

from .cases import Case, Headline, Setting
from .cross_attention import Op, cases_for

HEADLINES: dict[str, Headline] = {"forward": "top", "backward": "results"}


def gather(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
    """In plain PyTorch: every byte gathers its patch's queries, and softmax terms are scattered."""
    batch, _, heads, width = k.shape
    capacity = layout.capacity
    slots = q.shape[1] // capacity
    ids = layout.patch_ids.long()
    row = torch.arange(batch, device=q.device)[:, None]
    q_of_byte = q.view(batch, capacity, slots, heads, width)[row, ids.clamp(min=0)]  # [B, N, K, H, E]
    scores = (q_of_byte * k[:, :, None]).float().sum(-1) * width**-0.5  # [B, N, K, H]; bf16 sums would be wrong
    scores = scores.masked_fill((ids < 0)[:, :, None, None], -torch.inf)
    index = ids.clamp(min=0)[:, :, None, None].expand_as(scores)
    top = scores.new_full((batch, capacity, slots, heads), -torch.inf).scatter_reduce(1, index, scores.detach(), "amax")
    terms = (scores - top.gather(1, index)).exp()
    total = terms.new_zeros(top.shape).scatter_add(1, index, terms)
    weights = terms / total.gather(1, index)
    out = scores.new_zeros(batch, capacity, slots, heads, width)
    values = weights[..., None] * v[:, :, None]
    return out.scatter_add(1, index[..., None].expand_as(values), values).view_as(q).to(q.dtype)


def cases(setting: Setting) -> Iterator[Case]:
    op = Op("encoder", encoder_cross_attention, reference.encoder_cross_attention, gather, HEADLINES)
    return cases_for(setting, op)
