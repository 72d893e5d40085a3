"""Autograd and autocast pieces that several ops share."""

from __future__ import annotations

from typing import Any

import torch

# This is found out once, because torch.compile of torch 2.10 cannot trace the question. Asking autocast about another
# device is an error.
_AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "hpu", "mps", "mtia") if torch.amp.is_autocast_available(name)
)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives matrix products on `device`; None where it is off, or knows no such device."""
    if device.type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def register_no_double_backward(op: str, backward_op: str | None = None) -> None:
    """Makes a second derivative through `blt_kernels::<op>_backward` an explained error instead of a silent zero.

    `backward_op` names the backward op where it is another.
    """

    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(
            f"blt_kernels.{op} has no second derivative (double backward). Use use_backend('reference') for the part "
            "of the graph that is differentiated twice."
        )

    torch.library.register_autograd(f"blt_kernels::{backward_op or op + '_backward'}", backward)
