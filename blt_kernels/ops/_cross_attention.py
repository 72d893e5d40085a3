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
    device = q.device
    batch, num_bytes, capacity = check_layout(op, layout, device, "q")
    if scale is not None:
        check_real(op, "scale", scale)
    check_int(op, "window", window, 1, INT64_MAX)

    check_device(op, "k", k, device, "q")
    check_device(op, "v", v, device, "q")
    if (dtype := autocast_dtype(device)) is not None:
        # Under autocast attention runs in the low-precision dtype; float64 is left alone, as torch's own ops do.
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    if k.dtype != q.dtype or v.dtype != q.dtype:
        name, x = ("k", k) if k.dtype != q.dtype else ("v", v)
        raise fail_type(op, name, f"dtype {describe([q.dtype])} (as q)", describe([x.dtype]))

    # Sizes are compared here and not by check_shape, which says what is wrong where they differ: it takes longer.
    q_shape, k_shape = q.shape, k.shape
    rows, bytes_ = (q_shape[1], k_shape[1]) if slots == "q" else (k_shape[1], q_shape[1])
    if q_shape[0] != batch or k_shape[0] != batch or bytes_ != num_bytes:
        for name, x in (("q", q), ("k", k)):
            check_shape(op, name, x, (batch, None if name == slots else num_bytes, None, None))
    if rows < capacity or rows != rows // max(capacity, 1) * capacity:
        raise fail_value(op, slots, f"C*K rows, C = {capacity} slots of the layout and K >= 1", f"{rows} rows")
    if q_shape[3] < 1:
        raise fail_value(op, "q", "head dimension E >= 1", f"shape {tuple(q_shape)}")
    if k_shape[3] != q_shape[3]:
        check_shape(op, "k", k, (None, None, None, q_shape[3]))
    if v.shape != k_shape:
        check_shape(op, "v", v, k_shape)
    heads, key_heads = q_shape[2], k_shape[2]
    if heads < 1 or key_heads < 1 or heads % key_heads:
        raise fail_value(op, "q", f"a positive multiple of the {key_heads} heads of k", f"{heads} heads")
    return q, k, v


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
        dq, dk, dv = op_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window, *needed)
        needs_q, needs_k, needs_v = needed
        return (dq if needs_q else None, dk if needs_k else None, dv if needs_v else None, *nothing)

    torch.library.register_fake(f"blt_kernels::{op}", fake)
    torch.library.register_fake(f"blt_kernels::{op}_backward", fake_backward)
    op_backward = register_no_double_backward(op)
    return register_derivative(op, backward, setup_context)
