"""patch_pool (max) against its definition, scatter_reduce (as published code pools) and segment_reduce."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from blt_kernels import PatchLayout, patch_gather, patch_pool, reference

from .cases import Case, Headline, Setting, forward_and_backward
from .patches import layout_for, sweeps

HEADLINES: dict[str, Headline] = {"forward": "top", "backward": "results"}


def scatter_reduce(x: torch.Tensor, ids: torch.Tensor, capacity: int) -> torch.Tensor:
    """What the published code does: expanded int64 ids, zeros where nothing lands."""
    out = x.new_zeros((x.shape[0], capacity, x.shape[2]))
    return out.scatter_reduce(1, ids[:, :, None].expand_as(x), x, "amax", include_self=False)


def segment_reduce(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """All rows as one, since torch.segment_reduce has one axis of segments."""
    pooled = torch.segment_reduce(x.flatten(0, 1), "max", lengths=lengths.flatten(), axis=0, unsafe=True)
    return pooled.unflatten(0, lengths.shape)


def clear_maxima(x: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
    """bool [B, N, D]: the maximum of the byte's patch is reached once and is not 0.

    Elsewhere torch's own gradients are not the definition's: of a tie segment_reduce takes one winner, and a maximum of
    0 shares its gradient with the zeros that scatter_reduce starts from, which it was told to leave out.
    """
    own = patch_gather(patch_pool(x, layout), layout, "own")
    winners = patch_gather(patch_pool((x == own).float(), layout, "sum"), layout, "own")
    return (winners == 1) & (own != 0)


def cases(setting: Setting) -> Iterator[Case]:
    return sweeps(setting, cases_of, HEADLINES)


def cases_of(setting: Setting, batch: int, num_bytes: int, width: int, kind: str) -> Iterator[Case]:
    layout: PatchLayout = layout_for(kind, batch, num_bytes, setting.device)
    ids, lengths, capacity = layout.patch_ids.long(), layout.lengths(), layout.capacity
    x = setting.randn(batch, num_bytes, width)
    compiled = torch.compile(scatter_reduce, dynamic=False)
    compiled_reference = torch.compile(reference.patch_pool, dynamic=False)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "ours": lambda x: patch_pool(x, layout),
        "reference": lambda x: reference.patch_pool(x, layout),
        "reference compiled": lambda x: compiled_reference(x, layout),
        "scatter_reduce": lambda x: scatter_reduce(x, ids, capacity),
        "scatter_reduce compiled": lambda x: compiled(x, ids, capacity),
    }
    if bool((lengths > 0).all()):  # it has no value for an empty slot
        functions["segment_reduce"] = lambda x: segment_reduce(x, lengths)
    read, pooled = x.nbytes, batch * capacity * width * x.element_size()
    yield from forward_and_backward(
        {"B": batch, "N": num_bytes, "D": width, "patches": kind},
        functions,
        (x,),
        forward_bytes=read + pooled,
        backward_bytes=2 * read + 2 * pooled,  # x, the result and its gradient in; grad_x out
        comparable=clear_maxima(x, layout),
    )
