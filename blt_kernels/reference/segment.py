"""The definition of patching: which positions start a patch. t + 1 is the byte after t in the same sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..layout import PatchLayout
from ..tokens import BYTE_OFFSET
from .layout import Bytes, bytes_of, from_starts


def segment(
    entropies: torch.Tensor,
    threshold: float,
    *,
    rule: str = "threshold",
    delta: float | None = None,
    max_patch_length: int | None = None,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bos_patch: bool = True,
    capacity: int | None = None,
) -> PatchLayout:
    where = bytes_of(entropies.shape, entropies.device, seq_lens, cu_seqlens, "segment")
    e = entropies.detach().float()
    above = e > _fp32(threshold)
    rise = e - F.pad(e[:, :-1], (1, 0))
    if rule == "threshold":
        next_starts, undecided = above, 0
    elif rule == "monotonic":
        next_starts, undecided = rise > _fp32(threshold), 1
    else:
        assert delta is not None
        next_starts, undecided = above & (rise > _fp32(delta)), 1
    # With the BOS patch e[0] is not used: position 1 starts a patch, and a difference of two used entropies is there
    # from t = 2, so that position 2 starts one too. Without it t = 0 has no difference to go by.
    next_starts = next_starts & (where.position >= undecided)
    if bos_patch:
        next_starts = next_starts | (where.position <= undecided)
    return _layout(next_starts, where, max_patch_length, seq_lens, cu_seqlens, capacity, "segment")


def segment_spaces(
    tokens: torch.Tensor,
    *,
    byte_offset: int = BYTE_OFFSET,
    max_patch_length: int | None = None,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bos_patch: bool = True,
    capacity: int | None = None,
) -> PatchLayout:
    where = bytes_of(tokens.shape, tokens.device, seq_lens, cu_seqlens, "segment_spaces")
    u = tokens.long() - byte_offset
    spacelike = (u < ord("0")) | ((u > ord("9")) & (u < ord("A"))) | ((u > ord("Z")) & (u < ord("a")))
    spacelike |= ((u > ord("z")) & (u < 0x80)) | (u >= 0xC0)
    next_starts = spacelike & ~F.pad(spacelike[:, :-1], (1, 0)) & (where.position >= 1)
    next_starts |= u < 0
    if bos_patch:
        next_starts |= where.position == 0
    return _layout(next_starts, where, max_patch_length, seq_lens, cu_seqlens, capacity, "segment_spaces")


def segment_fixed(
    tokens: torch.Tensor,
    patch_size: int,
    *,
    max_patch_length: int | None = None,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bos_patch: bool = True,
    capacity: int | None = None,
) -> PatchLayout:
    where = bytes_of(tokens.shape, tokens.device, seq_lens, cu_seqlens, "segment_fixed")
    next_starts = (where.position + (0 if bos_patch else 1)) % patch_size == 0
    return _layout(next_starts, where, max_patch_length, seq_lens, cu_seqlens, capacity, "segment_fixed")


def _fp32(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _layout(
    next_starts: torch.Tensor,  # bool [B, N]: the byte after this one starts a patch
    where: Bytes,
    max_patch_length: int | None,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    capacity: int | None,
    op: str,
) -> PatchLayout:
    def starts() -> torch.Tensor:
        return (where.position == 0) | F.pad(next_starts[:, :-1], (1, 0))

    if max_patch_length is not None and next_starts.numel():
        i = torch.arange(next_starts.shape[1], device=next_starts.device)
        patch_start = torch.where(starts(), i, 0).cummax(1).values
        next_starts = next_starts | ((i + 1 - patch_start) % max_patch_length == 0)
    next_is_start = F.pad(next_starts, (1, 0))[where.row, where.end]  # the decision of each sequence's last byte
    return PatchLayout(
        *from_starts(
            starts(),
            seq_lens=seq_lens,
            cu_seqlens=cu_seqlens,
            next_is_start=next_is_start,
            capacity=capacity,
            op=op,
        )
    )
