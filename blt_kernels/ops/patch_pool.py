"""patch_pool: from bytes to patches; the bytes of each patch are reduced to one row."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._autograd import register_derivative, register_no_double_backward
from .._checks import FLOAT_DTYPES, check_choice, check_shape, check_tensor
from ..backend import backend_for
from ..layout import PatchLayout, check_layout

_OP = "patch_pool"


def patch_pool(x: torch.Tensor, layout: PatchLayout, reduce: str = "max") -> torch.Tensor:
    """Reduces the bytes of each patch: `out[b, c] = reduce(x[b, offsets[b, c] : offsets[b, c+1]])`.

    Byte Latent Transformer (arXiv 2412.09871), section 3.2.2: the local encoder's patch queries start from the pooled
    bytes of their patch. An empty slot gives 0 and passes no gradient; a byte in no patch gets gradient 0.

    "mean" and "sum" add in fp32 (fp64 for float64) whatever the dtype. "max" and "min" follow torch.amax and
    torch.amin: a gradient is split equally among ties, and NaN wins (the patch's result is then NaN, and so is its
    gradient at every byte of the patch).

    Args:
        x: [B, N, D] float32, float64, bfloat16 or float16.
        layout: of B rows and N bytes; C slots.
        reduce: "max", "mean", "min" or "sum".

    Returns:
        [B, C, D], dtype of `x`.

    Raises:
        TypeError: `x` is not a dense float tensor, `layout` not a PatchLayout.
        ValueError: shapes or devices that do not fit, an unknown `reduce`.
    """
    check_tensor(_OP, "x", x, ndim=3, dtypes=FLOAT_DTYPES)
    batch, num_bytes, _ = check_layout(_OP, layout, x.device, "x")
    check_shape(_OP, "x", x, (batch, num_bytes, None))
    check_choice(_OP, "reduce", reduce, ("max", "mean", "min", "sum"))
    if backend_for(_OP, x.device, x) == "reference":
        return reference.patch_pool(x, layout, reduce)
    return _patch_pool(x, layout.offsets, reduce)


@torch.library.register_fake("blt_kernels::patch_pool")
def _fake(x: torch.Tensor, offsets: torch.Tensor, reduce: str) -> torch.Tensor:
    return x.new_empty((x.shape[0], offsets.shape[1] - 1, x.shape[2]))


@torch.library.register_fake("blt_kernels::patch_pool_backward")
def _fake_backward(
    grad: torch.Tensor,
    offsets: torch.Tensor,
    x: torch.Tensor | None,
    out: torch.Tensor | None,
    num_bytes: int,
    reduce: str,
) -> torch.Tensor:
    return grad.new_empty((grad.shape[0], num_bytes, grad.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, str], output: torch.Tensor) -> None:
    x, offsets, ctx.reduce = inputs
    ctx.num_bytes = x.shape[1]
    # Only max and min need the values again, to see which bytes won.
    ctx.save_for_backward(offsets, *((x, output) if ctx.reduce in ("max", "min") else ()))


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    offsets, *values = ctx.saved_tensors
    x, out = values or (None, None)
    grad_x = _patch_pool_backward(grad, offsets, x, out, ctx.num_bytes, ctx.reduce)
    return grad_x, None, None


_patch_pool = register_derivative(_OP, _backward, _setup_context)
_patch_pool_backward = register_no_double_backward(_OP)
