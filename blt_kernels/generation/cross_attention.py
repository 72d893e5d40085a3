"""Cross-attention between the bytes of one patch, or one byte, and the slots of one patch.

The ops of the kernel library do it for whole rows of patches. For one patch a row, a layout takes longer to make than
the attention takes, so these functions do without one.
"""

from __future__ import annotations

from typing import Any

import torch

from ..model.encoder import LocalEncoder
from .caches import attend_to
from .fused import rms_norm


def keys_and_values(cross: Any, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `cross`, one of the two modules of `nn`, reads from context [R, L, d]: two tensors [R, L, Hkv, E]."""
    context = rms_norm(cross.k_norm, context)
    heads = (-1, cross.head_dim)
    return cross.k_proj(context).unflatten(-1, heads), cross.v_proj(context).unflatten(-1, heads)


def cross_attend(
    cross: Any, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """x [R, L, d] after it has read keys and values; the published residual is added twice."""
    q = cross.q_proj(rms_norm(cross.q_norm, x)).unflatten(-1, (-1, cross.head_dim))
    return torch.add(cross.o_proj(attend_to(q, k, v, mask).flatten(-2)), x, alpha=2)


def pool(encoder: LocalEncoder, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """`LocalEncoder.pool` of one patch a row.

    Args:
        x: [R, P, d], the bytes of a patch, padded on the right to the longest, of which `lengths` [R] are real.

    Returns:
        [R, 1, K*d]
    """
    mask, pooled = None, x
    if min(lengths) < x.shape[1]:
        outside = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        pooled = x.masked_fill(outside[..., None], -torch.inf)
        mask = x.new_zeros(outside.shape).masked_fill_(outside, -torch.inf)[:, None, None]
    slots = encoder.patch_embedding_projection(pooled.amax(1)).type_as(x).view(len(x), -1, x.shape[-1])
    cross = encoder.cross_attn_layers[0]
    return cross_attend(cross, slots, *keys_and_values(cross, x), mask).flatten(1)[:, None]
