"""The ops on a GPU, for tests that have their tensors on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from helpers import written

from blt_kernels import available_backends


def has_gpu() -> bool:
    return "cuda" in available_backends() and torch.cuda.is_available()


def move(arguments: Any, device: torch.device | str) -> Any:
    """Copies of all tensors in `arguments` on `device`, with the strides and offsets of these, and sharing what they
    share.

    `Tensor.to` would make them contiguous at the start of memory of their own: an unaligned row or a view of a wider
    tensor would become the plain case.
    """
    storages: dict[int, torch.Tensor] = {}

    def copy(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        key = storage.data_ptr()
        if key not in storages:
            storages[key] = torch.empty(0, dtype=torch.uint8).set_(storage).to(device, copy=True)
        whole = torch.empty(0, dtype=x.dtype, device=device).set_(storages[key].untyped_storage())
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    return pytree.tree_map_only(torch.Tensor, copy, arguments)


class GPUOps:
    """`torch.ops.blt_kernels` for tensors on the CPU, which go to the GPU; the results come back.

    Another `device` rehearses that where there is no GPU.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.blt_kernels, name)

        def call(*args: Any) -> Any:
            moved = move(args, self.device)
            result = pytree.tree_map_only(torch.Tensor, lambda x: x.cpu(), op(*moved))
            for i in written(name):
                args[i].copy_(moved[i])
            return result

        return call


# What follows does its work on a GPU. On the CPU it rehearses: the same lines run, with nothing to wait for or to
# record.


@contextlib.contextmanager
def without_waiting(device: torch.device) -> Iterator[None]:
    """Raises where the block waits for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@contextlib.contextmanager
def on_another_stream(device: torch.device) -> Iterator[None]:
    """Runs the block on a stream of its own, after what came before the block and before what comes after it."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(fn: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """The results of `fn` as a CUDA graph holds them, and a call that computes them again in place."""
    with on_another_stream(device):
        fn()  # whatever is set up once
    if device.type != "cuda":
        results = fn()

        def again() -> None:
            for kept, new in zip(pytree.tree_leaves(results), pytree.tree_leaves(fn()), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)

        return results, again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = fn()
    return results, graph.replay
