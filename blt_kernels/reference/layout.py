"""The definition of PatchLayout: its fields, from patch lengths or from a mask of patch starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .._checks import can_look_at, check_sequence_values, fail_value

Fields = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Bytes(NamedTuple):
    """Where each byte of the batch lies. S sequences: the rows when padded, those of cu_seqlens when packed."""

    sequence: torch.Tensor  # int64 [B, N], in 0 .. S-1; meaningless where not real
    position: torch.Tensor  # int64 [B, N], in the byte's own sequence
    real: torch.Tensor  # bool [B, N], False outside seq_lens or cu_seqlens
    row: torch.Tensor  # int64 [S], the row of each sequence
    end: torch.Tensor  # int64 [S], one past the last byte of each sequence


def bytes_of(
    shape: Sequence[int],  # B, N
    device: torch.device,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    op: str,
) -> Bytes:
    batch, num_bytes = shape
    check_sequence_values(op, num_bytes, seq_lens, cu_seqlens)
    i = torch.arange(num_bytes, device=device).expand(batch, num_bytes)
    if cu_seqlens is None:
        row = torch.arange(batch, device=device)
        end = torch.full_like(row, num_bytes) if seq_lens is None else seq_lens.long()
        return Bytes(row[:, None].expand_as(i), i, i < end[:, None], row, end)
    cu = cu_seqlens.long()
    # How many sequences end at or before byte i.
    sequence = torch.searchsorted(cu[1:].contiguous(), i.contiguous(), right=True)
    position = i - cu[sequence]
    return Bytes(sequence, position, i < cu[-1], torch.zeros_like(cu[1:]), cu[1:])


def from_starts(
    mask: torch.Tensor,
    *,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    next_is_start: torch.Tensor | None = None,
    capacity: int | None = None,
    op: str = "PatchLayout.from_starts",
) -> Fields:
    where = bytes_of(mask.shape, mask.device, seq_lens, cu_seqlens, op)
    starts = mask & where.real
    if cu_seqlens is not None:
        starts = starts | (where.real & (where.position == 0))
    slot = starts.cumsum(1) - 1  # [B, N]; -1 before the first start
    if capacity is None:
        capacity = mask.shape[1]
    elif cu_seqlens is None:
        slot = slot.clamp(max=capacity - 1)
    else:  # every later sequence keeps at least one slot
        slot = torch.minimum(slot, capacity - (cu_seqlens.numel() - 1) + where.sequence)
    slot = torch.where(where.real, slot, capacity)
    slots = torch.arange(capacity + 1, device=mask.device).expand(mask.shape[0], -1)
    offsets = torch.searchsorted(slot.contiguous(), slots.contiguous())  # the first byte whose slot is c or above
    overflow = starts.sum(1) - (offsets.diff() > 0).sum(1)
    return _fields(offsets, where, next_is_start, overflow, packed=cu_seqlens is not None)


def from_lengths(
    lengths: torch.Tensor,
    num_bytes: int | None = None,
    *,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    next_is_start: torch.Tensor | None = None,
    op: str = "PatchLayout.from_lengths",
) -> Fields:
    lengths = lengths.long().clamp(min=0)
    if num_bytes is None:
        num_bytes = int(lengths.sum(1).max()) if lengths.shape[0] else 0
    lengths = lengths.clamp(max=num_bytes + 2)  # still too long, but the sum cannot wrap
    where = bytes_of((lengths.shape[0], num_bytes), lengths.device, seq_lens, cu_seqlens, op)
    real = where.real.sum(1, keepdim=True)  # [B, 1]: bytes from here on are not there
    ends = F.pad(lengths.cumsum(1), (1, 0))  # [B, P+1]
    _check_lengths(op, ends, num_bytes, cu_seqlens)
    if next_is_start is None:
        # Lengths that reach beyond the real bytes say whether the next, unseen byte is the first of its slot.
        next_is_start = ((ends[:, :-1] == real) & (lengths > 0)).any(1)[where.row] & (where.end == real[where.row, 0])
    overflow = torch.zeros_like(real[:, 0])
    return _fields(torch.minimum(ends, real), where, next_is_start, overflow, packed=cu_seqlens is not None)


def _fields(
    offsets: torch.Tensor, where: Bytes, next_is_start: torch.Tensor | None, overflow: torch.Tensor, packed: bool
) -> Fields:
    batch, num_bytes = where.real.shape
    i = torch.arange(num_bytes, device=offsets.device).expand(batch, -1).contiguous()
    in_patch = (i >= offsets[:, :1]) & (i < offsets[:, -1:])
    own = torch.searchsorted(offsets[:, 1:].contiguous(), i, right=True)  # how many patches end at or before i
    own = torch.where(in_patch, own, -1)

    slots = torch.arange(1, offsets.shape[1], device=offsets.device)
    num_patches = F.pad((offsets.diff() > 0) * slots, (1, 0)).amax(1)
    if packed:
        # A sequence begins at the slot of its first byte, and one without bytes where the next one begins.
        begin = F.pad(where.end, (1, 0))
        slot = F.pad(own[0], (0, 1), value=-1)[begin]
        cu_patches = torch.where(slot < 0, num_patches, slot)
        cu_patches = torch.where(begin == 0, 0, cu_patches)
        cu_patches[-1:] = num_patches
        first = cu_patches[where.sequence]
    else:
        cu_patches = F.pad(num_patches.cumsum(0), (1, 0))
        first = torch.zeros_like(own)

    # The last patch finished at or before byte i is the one before the patch of byte i + 1 ...
    after = F.pad(own[:, 1:], (0, 1), value=-1)[:, :num_bytes]
    visible = after - 1
    # ... and at the end of a sequence its own, if the next, unseen byte is known to start a patch.
    is_last = (i + 1 == F.pad(where.end, (0, 1))[where.sequence]) | (after < 0)
    closed = torch.zeros_like(where.end) if next_is_start is None else next_is_start.long()
    visible = torch.where(is_last, own - 1 + F.pad(closed, (0, 1))[where.sequence], visible)
    visible = torch.where((visible < first) | ~in_patch, -1, visible)

    fields = (offsets, own, visible, num_patches, cu_patches, overflow)
    return tuple(field.to(torch.int32) for field in fields)  # type: ignore[return-value]


def _check_lengths(op: str, ends: torch.Tensor, num_bytes: int, cu_seqlens: torch.Tensor | None) -> None:
    if not can_look_at(ends) or not ends.numel():
        return
    longest = int(ends[:, -1].max())
    if longest > num_bytes + 1:
        raise fail_value(op, "lengths", f"sums of at most num_bytes + 1 = {num_bytes + 1}", longest)
    if cu_seqlens is not None:
        inner = cu_seqlens[(cu_seqlens < ends[0, -1]) & (cu_seqlens < cu_seqlens[-1])]
        for begin in inner[~torch.isin(inner, ends[0])].tolist():
            raise fail_value(op, "lengths", f"a patch that starts at byte {begin}, where a sequence does", "none")
