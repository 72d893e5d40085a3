"""What the two cross-attentions share: argument checks, autocast, fakes and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._autograd import autocast_dtype, register_derivative, register_no_double_backward
from .._checks import (
    FLOAT_DTYPES,
    INT64_MAX,
    check_device,
    check_int,
    check_real,
    check_shape,
    check_tensor,
    describe,
    fail_type,
    fail_value,
)
from ..layout import check_layout


def prepare(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    layout: Any,
    scale: Any,
    window: Any,
    *,
    slots: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, cast under autocast. `slots` names the side, "q" or "k", that has K rows a patch.

    Raises TypeError or ValueError unless the arguments fit each other.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, x, ndim=4, dtypes=FLOAT_DTYPES)
    check_layout(op, layout, q.device, "q")
    if scale is not None:
        check_real(op, "scale", scale)
    check_int(op, "window", window, 1, INT64_MAX)

    for name, x in (("k", k), ("v", v)):
        check_device(op, name, x, q.device, "q")
    q, k, v = (_cast_for_autocast(x) for x in (q, k, v))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise fail_type(op, name, f"dtype {describe([q.dtype])} (as q)", describe([x.dtype]))

    batch, capacity, num_bytes = layout.offsets.shape[0], layout.capacity, layout.num_bytes
    for name, x in (("q", q), ("k", k)):
        check_shape(op, name, x, (batch, None if name == slots else num_bytes, None, None))
    rows = (q if slots == "q" else k).shape[1]
    if rows < capacity or rows != rows // max(capacity, 1) * capacity:
        raise fail_value(op, slots, f"C*K rows, C = {capacity} slots of the layout and K >= 1", f"{rows} rows")
    if q.shape[3] < 1:
        raise fail_value(op, "q", "head dimension E >= 1", f"shape {tuple(q.shape)}")
    check_shape(op, "k", k, (None, None, None, q.shape[3]))
    check_shape(op, "v", v, k.shape)
    heads, key_heads = q.shape[2], k.shape[2]
    if heads < 1 or key_heads < 1 or heads % key_heads:
        raise fail_value(op, "q", f"a positive multiple of the {key_heads} heads of k", f"{heads} heads")
    return q, k, v


def _cast_for_autocast(x: torch.Tensor) -> torch.Tensor:
    """Under autocast attention runs in the low-precision dtype; float64 is left alone, as torch's own ops do."""
    dtype = autocast_dtype(x.device)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def register(op: str, num_layout_tensors: int) -> Callable[..., Any]:
    """Fake kernels and autograd of `op(q, k, v, *layout tensors, scale, window) -> (out, lse)`; returns the op."""

    def fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=dtype)

    def fake_backward(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, *others: Any
    ) -> tuple[torch.Tensor, ...]:
        needed = others[-3:]
        return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip((q, k, v), needed, strict=True))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        q, k, v, *layout, scale, window = inputs
        lse = output[1]
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, lse, *layout)
        ctx.scale, ctx.window = scale, window

    def backward(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        nothing = (None,) * (num_layout_tensors + 2)
        needed = ctx.needs_input_grad[:3]
        if grad is None:
            return (None, None, None, *nothing)
        grads = op_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window, *needed)
        return (*(x if need else None for x, need in zip(grads, needed, strict=True)), *nothing)

    torch.library.register_fake(f"blt_kernels::{op}", fake)
    torch.library.register_fake(f"blt_kernels::{op}_backward", fake_backward)
    op_backward = register_no_double_backward(op)
    return register_derivative(op, backward, setup_context)
