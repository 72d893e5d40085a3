"""The ops on a GPU, for tests that have their tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from blt_kernels import available_backends


def has_gpu() -> bool:
    return "cuda" in available_backends() and torch.cuda.is_available()


class GPUOps:
    """`torch.ops.blt_kernels` for CPU tensors, which go to the GPU; the results come back."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.blt_kernels, name)

        def call(*args: Any) -> Any:
            on_gpu = pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), args)
            return pytree.tree_map_only(torch.Tensor, lambda t: t.cpu(), op(*on_gpu))

        return call
