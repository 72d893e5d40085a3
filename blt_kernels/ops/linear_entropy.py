"""linear_entropy: entropy of a linear head's predictions; the logits never reach memory whole."""

from __future__ import annotations

import torch

from .. import reference
from .._checks import FLOAT_DTYPES, check_device, check_tensor, fail_value

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
    return reference.linear_entropy(hidden, weight)
