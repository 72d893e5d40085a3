"""Optimisation with row-sparse gradients, for any training loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ._checks import check_number, fail_type


def clip_grad_norm(parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scales all gradients, dense and sparse together, so that their common 2-norm is at most `max_norm`.

    `torch.nn.utils.clip_grad_norm_` refuses sparse gradients.

    Args:
        parameters: one, or several; those without a gradient are left out.
        max_norm: positive and finite.

    Returns:
        The norm before clipping, a scalar tensor; 0 where there is no gradient.

    Raises:
        TypeError, ValueError: wrong argument.
    """
    op = "clip_grad_norm"
    check_number(op, "max_norm", max_norm, 0, above=True)
    values = []
    for parameter in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
        if not isinstance(parameter, torch.Tensor):
            raise fail_type(op, "parameters", "tensors", type(parameter).__name__)
        if parameter.grad is not None:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()  # ours are coalesced already, which makes this free
            values.append(parameter.grad._values() if parameter.grad.is_sparse else parameter.grad)
    if not values:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(values)
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(values, scale)
    return norm
