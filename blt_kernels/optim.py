"""Optimisation with row-sparse gradients, for any training loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales all gradients, dense and sparse together, so that their common 2-norm is at most `max_norm`.

    `torch.nn.utils.clip_grad_norm_` refuses sparse gradients.

    Returns:
        The norm before clipping, a scalar tensor.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is not None:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()  # free for our gradients
            values.append(parameter.grad._values() if parameter.grad.is_sparse else parameter.grad)
    norm = torch.nn.utils.get_total_norm(values)
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(values, scale)
    return norm
