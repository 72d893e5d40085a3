"""linear_entropy: entropy of a linear head's predictions; the logits never reach memory whole."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from .. import reference
from .._autograd import register_derivative, register_no_double_backward
from .._checks import FLOAT_DTYPES, check_device, check_tensor, fail_value
from ..backend import backend_for

_OP = "linear_entropy"


def linear_entropy(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`entropy(F.linear(hidden, weight))` without the [..., V] logits: peak memory is that of a few rows of them.

    For the entropy model of a Byte Latent Transformer (arXiv 2412.09871, section 2.3), whose only use is its
    entropies. Arithmetic is in fp32 (fp64 if either argument is float64), also under autocast, so the two dtypes may
    differ. A row's entropy is bit-identical whatever the shape and the number of threads. NaN and infinity as in
    `entropy`.

    Args:
        hidden: [..., D] float32, float64, bfloat16 or float16: final states of the model.
        weight: [V, D], V >= 1, one of the same dtypes: the head, as in `torch.nn.Linear(D, V, bias=False).weight`.

    Returns:
        [...] float32 nats; float64 if either argument is float64.

    Raises:
        TypeError: an argument is not a dense float tensor.
        ValueError: shapes that do not fit each other, V = 0, or different devices.
    """
    check_tensor(_OP, "hidden", hidden, dtypes=FLOAT_DTYPES)
    check_tensor(_OP, "weight", weight, ndim=2, dtypes=FLOAT_DTYPES)
    if weight.shape[0] < 1:
        raise fail_value(_OP, "weight", "shape [V, D] with V >= 1", f"shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise fail_value(
            _OP, "hidden", f"shape [..., D] with D = {weight.shape[1]} (weight)", f"shape {tuple(hidden.shape)}"
        )
    check_device(_OP, "weight", weight, hidden.device, "hidden")
    if backend_for(_OP, hidden.device, hidden, weight) == "reference":
        return reference.linear_entropy(hidden, weight)
    with _full_precision(hidden.device):
        return _linear_entropy(hidden, weight)


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast would reach into the CUDA op, whose matrix products are torch's own, and round the logits."""
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.autocast("cuda", enabled=False)
    return contextlib.nullcontext()


@torch.library.register_fake("blt_kernels::linear_entropy")
def _(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    return hidden.new_empty(hidden.shape[:-1], dtype=dtype)


@torch.library.register_fake("blt_kernels::linear_entropy_backward")
def _(
    grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, needs_hidden: bool, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    needs_hidden, needs_weight = ctx.needs_input_grad
    with _full_precision(grad.device):
        grad_hidden, grad_weight = _linear_entropy_backward(grad, *ctx.saved_tensors, needs_hidden, needs_weight)
    return grad_hidden if needs_hidden else None, grad_weight if needs_weight else None


_linear_entropy = register_derivative(_OP, _backward, _setup_context)
_linear_entropy_backward = register_no_double_backward(_OP)
