"""patch_gather (visible) against its definition and torch.gather with expanded int64 ids, as in a local decoder."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from blt_kernels import patch_gather, reference

from .cases import Case, Headline, Setting, forward_and_backward
from .patches import layout_for, sweeps

HEADLINES: dict[str, Headline] = {"forward": "results", "backward": "readme"}


def gather(y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Bytes that see nothing read the first row and are zeroed."""
    return torch.where(ids[:, :, None] < 0, 0, y.gather(1, ids.clamp(min=0)[:, :, None].expand(-1, -1, y.shape[2])))


def cases(setting: Setting) -> Iterator[Case]:
    return sweeps(setting, cases_of, HEADLINES)


def cases_of(setting: Setting, batch: int, num_bytes: int, width: int, kind: str) -> Iterator[Case]:
    layout = layout_for(kind, batch, num_bytes, setting.device)
    ids = layout.visible_ids.long()
    y = setting.randn(batch, layout.capacity, width)
    compiled = torch.compile(gather, dynamic=False)
    compiled_reference = torch.compile(reference.patch_gather, dynamic=False)
    functions = {
        "ours": lambda y: patch_gather(y, layout),
        "reference": lambda y: reference.patch_gather(y, layout),
        "reference compiled": lambda y: compiled_reference(y, layout),
        "gather": lambda y: gather(y, ids),
        "gather compiled": lambda y: compiled(y, ids),
    }
    moved = y.nbytes + batch * num_bytes * width * y.element_size()
    yield from forward_and_backward(
        {"B": batch, "N": num_bytes, "D": width, "patches": kind},
        functions,
        (y,),
        forward_bytes=moved,
        backward_bytes=moved,
    )
