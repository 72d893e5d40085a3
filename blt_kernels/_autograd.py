"""Autograd pieces that every op shares."""

from __future__ import annotations

from typing import Any

import torch


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
