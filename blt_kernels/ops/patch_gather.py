"""patch_gather: from patches to bytes; each byte gets the row of its patch."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._autograd import register_derivative, register_no_double_backward
from .._checks import FLOAT_DTYPES, check_choice, check_shape, check_tensor
from ..backend import backend_for
from ..layout import PatchLayout, check_layout

_OP = "patch_gather"


def patch_gather(y: torch.Tensor, layout: PatchLayout, which: str = "visible") -> torch.Tensor:
    """Gives each byte a row of `y`: that of the last finished patch ("visible") or of its own patch ("own").

    `out[b, i] = y[b, ids[b, i]]` with ids = `layout.visible_ids` or `layout.patch_ids`, and 0 where the id is -1.
    "visible" is what a causal decoder may see, patch(i+1) - 1 (Byte Latent Transformer, arXiv 2412.09871, section
    3.3); "own" undoes a pooling. The gradient of a row is the sum over the bytes that read it, in fp32 (fp64 for
    float64) whatever the dtype; a row that no byte reads gets 0.

    Args:
        y: [B, C, D] float32, float64, bfloat16 or float16.
        layout: of B rows and C slots; N bytes.
        which: "visible" or "own".

    Returns:
        [B, N, D], dtype of `y`.

    Raises:
        TypeError: `y` is not a dense float tensor, `layout` not a PatchLayout.
        ValueError: shapes or devices that do not fit, an unknown `which`.
    """
    check_tensor(_OP, "y", y, ndim=3, dtypes=FLOAT_DTYPES)
    batch, _, capacity = check_layout(_OP, layout, y.device, "y")
    check_shape(_OP, "y", y, (batch, capacity, None))
    check_choice(_OP, "which", which, ("visible", "own"))
    if backend_for(_OP, y.device, y) == "reference":
        return reference.patch_gather(y, layout, which)
    return _patch_gather(y, layout.visible_ids if which == "visible" else layout.patch_ids)


@torch.library.register_fake("blt_kernels::patch_gather")
def _fake(y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return y.new_empty((*ids.shape, y.shape[2]))


@torch.library.register_fake("blt_kernels::patch_gather_backward")
def _fake_backward(grad: torch.Tensor, ids: torch.Tensor, capacity: int) -> torch.Tensor:
    return grad.new_empty((grad.shape[0], capacity, grad.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    y, ids = inputs
    ctx.capacity = y.shape[1]
    ctx.save_for_backward(ids)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    (ids,) = ctx.saved_tensors
    return _patch_gather_backward(grad, ids, ctx.capacity), None


_patch_gather = register_derivative(_OP, _backward, _setup_context)
_patch_gather_backward = register_no_double_backward(_OP)
