"""patch_gather (visible) against torch.gather with expanded int64 ids, at the shapes of a local decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import Case, geometric_lengths, main

from blt_kernels import PatchLayout, patch_gather

MEAN_PATCH = 4.5
SHAPES = [(1, 4096, 1024), (4, 4096, 768), (1, 16384, 1024)]  # B, N, D


def gather(y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Bytes that see nothing read the first row and are zeroed."""
    return torch.where(ids[:, :, None] < 0, 0, y.gather(1, ids.clamp(min=0)[:, :, None].expand(-1, -1, y.shape[2])))


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for batch, num_bytes, width in SHAPES:
        yield from cases_of(f"mean {MEAN_PATCH}", geometric_lengths(batch, num_bytes, MEAN_PATCH), num_bytes, width)
    yield from cases_of("one patch", torch.tensor([[1, 16383]]), 16384, 1024)


def cases_of(name: str, lengths: torch.Tensor, num_bytes: int, width: int) -> Iterator[Case]:
    layout = PatchLayout.from_lengths(lengths, num_bytes)
    batch, capacity = lengths.shape
    ids = layout.visible_ids.long()
    y = torch.randn(batch, capacity, width, requires_grad=True)
    grad = torch.randn(batch, num_bytes, width)
    gathers = {
        "ours": partial(patch_gather, layout=layout),
        "eager": partial(gather, ids=ids),
        "compiled": partial(torch.compile(gather, dynamic=False), ids=ids),
    }
    outputs = {variant: fn(y) for variant, fn in gathers.items()}

    def forward(fn: Callable) -> torch.Tensor:
        with torch.no_grad():
            return fn(y)

    def backward(out: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(out, y, grad, retain_graph=True)[0]

    def check() -> None:
        assert torch.equal(outputs["ours"], outputs["eager"])
        torch.testing.assert_close(backward(outputs["ours"]), backward(outputs["eager"]), rtol=1e-3, atol=1e-3)

    shapes = {"B": batch, "N": num_bytes, "D": width}
    size = grad.nbytes + y.nbytes
    for case, call, arguments in (("forward", forward, gathers), ("backward", backward, outputs)):
        variants = {variant: partial(call, argument) for variant, argument in arguments.items()}
        yield Case(f"{case}, {name}", shapes, variants, size, check)


if __name__ == "__main__":
    main("patch_gather", cases)
