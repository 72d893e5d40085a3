"""Entropy of next-byte predictions, by definition."""

from __future__ import annotations

import torch


def entropy(logits: torch.Tensor) -> torch.Tensor:
    x = logits if logits.dtype == torch.float64 else logits.float()
    log_p = torch.log_softmax(x, dim=-1)
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0, 0)  # 0 ln 0 = 0, in the gradient too
    return 0 - (p * log_p).sum(-1)  # 0 - 0 is +0, where -(0) is -0
