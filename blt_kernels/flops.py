"""FLOP formulas of our ops for `torch.utils.flop_counter.FlopCounterMode`: import this module, and it counts them.

The convention is the counter's: a multiplication and an addition are two FLOPs, a query counts every key of its window,
and backward computes the scores again, so that it has 5 products where forward has 2. `import blt_kernels` does not
register the formulas, because the counter imports Triton where there is one. Formulas see shapes alone, so that they
hold for fake tensors too. The FLOPs of whole models are in `blt_kernels.model.flops`.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula


def _product(q: tuple[int, ...], slots: int, num_bytes: int, offsets: tuple[int, ...], window: int) -> int:
    """One product of queries and keys, or of weights and values: each byte meets the slots of `window` patches."""
    batch, _, heads, width = q
    capacity = offsets[1] - 1
    return 2 * batch * heads * width * num_bytes * (slots * min(window, capacity) // max(capacity, 1))


def _backward_products(need_q: bool, need_k: bool, need_v: bool) -> int:
    """The scores again, the gradient of the weights, and those of q, k and v."""
    return 1 + (need_q or need_k) + need_q + need_k + need_v


@register_flop_formula(torch.ops.blt_kernels.encoder_cross_attention)
def _(q, k, v, offsets, cu_patches, scale=None, window=1, *, out_shape):  # type: ignore[no-untyped-def]
    return 2 * _product(q, q[1], k[1], offsets, window)


@register_flop_formula(torch.ops.blt_kernels.encoder_cross_attention_backward)
def _(grad, q, k, v, lse, offsets, cu_patches, scale, window, *needs, out_shape):  # type: ignore[no-untyped-def]
    return _backward_products(*needs) * _product(q, q[1], k[1], offsets, window)


@register_flop_formula(torch.ops.blt_kernels.decoder_cross_attention)
def _(q, k, v, visible_ids, offsets, cu_patches, scale=None, window=1, *, out_shape):  # type: ignore[no-untyped-def]
    return 2 * _product(q, k[1], q[1], offsets, window)


@register_flop_formula(torch.ops.blt_kernels.decoder_cross_attention_backward)
def _(grad, q, k, v, lse, visible_ids, offsets, cu_patches, scale, window, *needs, out_shape):  # type: ignore[no-untyped-def]
    return _backward_products(*needs) * _product(q, k[1], q[1], offsets, window)


@register_flop_formula(torch.ops.blt_kernels.linear_entropy)
def _(hidden, weight, *, out_shape):  # type: ignore[no-untyped-def]
    return 2 * math.prod(hidden) * weight[0]


@register_flop_formula(torch.ops.blt_kernels.linear_entropy_backward)
def _(grad, hidden, weight, needs_hidden, needs_weight, *, out_shape):  # type: ignore[no-untyped-def]
    return (1 + needs_hidden + needs_weight) * 2 * math.prod(hidden) * weight[0]  # the logits again, the gradients
