"""patch_pool (max) against torch's own scatter_reduce, at the shapes of a local encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import Case, geometric_lengths, main

from blt_kernels import PatchLayout, patch_pool

MEAN_PATCH = 4.5
SHAPES = [(1, 4096, 1024), (4, 4096, 768), (1, 16384, 1024)]  # B, N, D


def scatter_reduce(x: torch.Tensor, ids: torch.Tensor, capacity: int) -> torch.Tensor:
    """What the published code does: expanded int64 ids, zeros where nothing lands."""
    out = x.new_zeros((x.shape[0], capacity, x.shape[2]))
    return out.scatter_reduce(1, ids[:, :, None].expand_as(x), x, "amax", include_self=False)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for batch, num_bytes, width in SHAPES:
        yield from cases_of(f"mean {MEAN_PATCH}", geometric_lengths(batch, num_bytes, MEAN_PATCH), num_bytes, width)
    yield from cases_of("one patch", torch.tensor([[16384]]), 16384, 1024)


def cases_of(name: str, lengths: torch.Tensor, num_bytes: int, width: int) -> Iterator[Case]:
    layout = PatchLayout.from_lengths(lengths, num_bytes)
    batch, capacity = lengths.shape
    ids = layout.patch_ids.long()
    x = torch.randn(batch, num_bytes, width, requires_grad=True)
    grad = torch.randn(batch, capacity, width)
    pools = {
        "ours": partial(patch_pool, layout=layout),
        "eager": partial(scatter_reduce, ids=ids, capacity=capacity),
        "compiled": partial(torch.compile(scatter_reduce, dynamic=False), ids=ids, capacity=capacity),
    }
    outputs = {variant: pool(x) for variant, pool in pools.items()}

    def forward(pool: Callable) -> torch.Tensor:
        with torch.no_grad():
            return pool(x)

    def backward(out: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(out, x, grad, retain_graph=True)[0]

    def both(pool: Callable) -> torch.Tensor:
        return torch.autograd.grad(pool(x), x, grad)[0]

    def check() -> None:
        torch.testing.assert_close(outputs["ours"], outputs["eager"], rtol=0, atol=0)
        torch.testing.assert_close(backward(outputs["ours"]), backward(outputs["eager"]))

    element = x.element_size()
    shapes = {"B": batch, "N": num_bytes, "D": width}
    read, pooled = math.prod(x.shape) * element, math.prod(grad.shape) * element
    for case, call, arguments, size in (
        ("forward", forward, pools, read + pooled),
        ("backward", backward, outputs, 2 * read + 2 * pooled),  # x, the result and its gradient in; grad_x out
        ("both", both, pools, 3 * read + 3 * pooled),
    ):
        variants = {variant: partial(call, argument) for variant, argument in arguments.items()}
        yield Case(f"{case}, {name}", shapes, variants, size, check)


if __name__ == "__main__":
    main("patch_pool", cases)
