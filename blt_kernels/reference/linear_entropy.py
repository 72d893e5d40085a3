"""Entropy of a linear head's predictions, by definition."""

from __future__ import annotations

import contextlib

import torch

from .entropy import entropy


def linear_entropy(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    device = hidden.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext():
        return entropy(hidden.to(dtype) @ weight.to(dtype).T)
