"""The definition of rowwise_adagrad_update."""

from __future__ import annotations

import torch


@torch.no_grad()
def rowwise_adagrad_update(
    table: torch.Tensor,
    state: torch.Tensor,
    rows: torch.Tensor,
    values: torch.Tensor,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    scale: torch.Tensor | None = None,
) -> None:
    grad = values.to(state.dtype)
    if scale is not None:
        grad = grad * scale
    sums = state[rows] + grad.square().mean(1)
    step = lr / (sums.sqrt() + eps)
    kept = table[rows].to(state.dtype) * (1 - lr * weight_decay)
    table[rows] = (kept - step[:, None] * grad).to(table.dtype)
    state[rows] = sums
