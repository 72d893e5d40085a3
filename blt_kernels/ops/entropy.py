"""entropy: the entropy of next-byte predictions, which says how uncertain each one is."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._autograd import register_derivative, register_no_double_backward
from .._checks import FLOAT_DTYPES, check_tensor, fail_value
from ..backend import backend_for

_OP = "entropy"


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the softmax of each row of logits, in nats: H = -sum_i p_i ln p_i.

    Byte Latent Transformer (arXiv 2412.09871), section 2.3, equation 1. Arithmetic is in fp32 whatever the dtype of
    the logits (bf16 arithmetic flips about 7 % of the patch boundaries), also under autocast. A row's entropy does
    not depend on its neighbours: it is bit-identical whatever the shape and the number of threads.

    A logit of -inf (a masked token) has p = 0, contributes nothing and gets gradient 0. A row that contains NaN or
    +inf, or nothing but -inf, has no softmax: its entropy and gradient are NaN. Otherwise 0 <= H, exactly 0 when
    one logit leads by more than 104.

    Args:
        logits: [..., V], V >= 1, float32, float64, bfloat16 or float16.

    Returns:
        [...] float32; float64 for float64 logits, which are computed in float64.

    Raises:
        TypeError: `logits` is not a dense float tensor.
        ValueError: no vocabulary dimension, or V = 0.
    """
    check_tensor(_OP, "logits", logits, dtypes=FLOAT_DTYPES)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise fail_value(_OP, "logits", "shape [..., V] with V >= 1", f"shape {tuple(logits.shape)}")
    if backend_for(_OP, logits.device, logits) == "reference":
        return reference.entropy(logits)
    return _entropy(logits)


@torch.library.register_fake("blt_kernels::entropy")
def _(logits: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[:-1], dtype=dtype)


@torch.library.register_fake("blt_kernels::entropy_backward")
def _(grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return entropy_backward(grad, *ctx.saved_tensors)


_entropy = register_derivative(_OP, _backward, _setup_context)
entropy_backward = register_no_double_backward(_OP)
