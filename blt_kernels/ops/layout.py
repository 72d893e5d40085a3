"""The fields of a PatchLayout, from patch lengths or a mask of patch starts. Documented at PatchLayout.from_*."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensor

from .._checks import INT_DTYPES, check_device, check_int, check_sequences, check_shape, check_tensor, fail_value
from ..backend import backend_for
from ..reference import layout as reference
from ..reference.layout import Fields

MAX_BYTES = 2**31 - 1  # layouts are int32


def from_lengths(
    lengths: torch.Tensor,
    num_bytes: int | None,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    next_is_start: torch.Tensor | None,
) -> Fields:
    op = "PatchLayout.from_lengths"
    check_tensor(op, "lengths", lengths, ndim=2, dtypes=INT_DTYPES)
    if num_bytes is None:
        if lengths.device.type != "cpu" or isinstance(lengths, FakeTensor):
            raise fail_value(op, "num_bytes", "an int (lengths has no values on the CPU)", None)
        num_bytes = int(lengths.clamp(min=0).sum(1).max()) if lengths.shape[0] else 0
    check_int(op, "num_bytes", num_bytes, 0, MAX_BYTES)
    sequences = check_sequences(op, lengths.shape[0], lengths.device, "lengths", seq_lens, cu_seqlens, num_bytes)
    _check_next_is_start(op, next_is_start, sequences, lengths.device, "lengths")
    if backend_for(op, lengths.device) == "reference":
        return reference.from_lengths(
            lengths, num_bytes, seq_lens=seq_lens, cu_seqlens=cu_seqlens, next_is_start=next_is_start
        )
    return torch.ops.blt_kernels.layout_from_lengths(lengths, num_bytes, seq_lens, cu_seqlens, next_is_start)


def from_starts(
    mask: torch.Tensor,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    next_is_start: torch.Tensor | None,
    capacity: int | None,
) -> Fields:
    op = "PatchLayout.from_starts"
    check_tensor(op, "mask", mask, ndim=2, dtypes=(torch.bool,))
    sequences = check_segmentation(op, mask, "mask", seq_lens, cu_seqlens, capacity)
    _check_next_is_start(op, next_is_start, sequences, mask.device, "mask")
    if backend_for(op, mask.device) == "reference":
        return reference.from_starts(
            mask, seq_lens=seq_lens, cu_seqlens=cu_seqlens, next_is_start=next_is_start, capacity=capacity
        )
    return torch.ops.blt_kernels.layout_from_starts(mask, seq_lens, cu_seqlens, next_is_start, capacity)


def check_segmentation(
    op: str,
    per_byte: torch.Tensor,
    owner: str,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    capacity: int | None,
) -> int:
    """Checks what every function that cuts [B, N] bytes into patches takes, and returns the number of sequences."""
    if per_byte.shape[1] > MAX_BYTES:
        raise fail_value(op, owner, f"at most {MAX_BYTES} bytes a row", per_byte.shape[1])
    batch, num_bytes = per_byte.shape[:2]
    sequences = check_sequences(op, batch, per_byte.device, owner, seq_lens, cu_seqlens, num_bytes)
    if capacity is not None:
        check_int(op, "capacity", capacity, 0, MAX_BYTES)
        in_row = 1 if cu_seqlens is None else sequences
        if capacity < in_row:
            raise fail_value(op, "capacity", f"at least {in_row}, one slot for each sequence in a row", capacity)
    return sequences


def _check_next_is_start(
    op: str, next_is_start: torch.Tensor | None, sequences: int, device: torch.device, owner: str
) -> None:
    if next_is_start is not None:
        check_tensor(op, "next_is_start", next_is_start, dtypes=(torch.bool,))
        check_shape(op, "next_is_start", next_is_start, (sequences,))
        check_device(op, "next_is_start", next_is_start, device, owner)


def fake_fields(
    like: torch.Tensor, batch: int, num_bytes: int, capacity: int, cu_seqlens: torch.Tensor | None
) -> Fields:
    """Empty fields of these sizes, for the fakes of the ops that make layouts."""
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        like.new_empty(batch, capacity + 1, dtype=torch.int32),
        like.new_empty(batch, num_bytes, dtype=torch.int32),
        like.new_empty(batch, num_bytes, dtype=torch.int32),
        like.new_empty(batch, dtype=torch.int32),
        like.new_empty(sequences + 1, dtype=torch.int32),
        like.new_empty(batch, dtype=torch.int32),
    )


def fake_segmentation(per_byte: torch.Tensor, cu_seqlens: torch.Tensor | None, capacity: int | None) -> Fields:
    batch, num_bytes = per_byte.shape
    return fake_fields(per_byte, batch, num_bytes, num_bytes if capacity is None else capacity, cu_seqlens)


@torch.library.register_fake("blt_kernels::layout_from_lengths")
def _(
    lengths: torch.Tensor,
    num_bytes: int,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    next_is_start: torch.Tensor | None,
) -> Fields:
    return fake_fields(lengths, lengths.shape[0], num_bytes, lengths.shape[1], cu_seqlens)


@torch.library.register_fake("blt_kernels::layout_from_starts")
def _(
    mask: torch.Tensor,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    next_is_start: torch.Tensor | None,
    capacity: int | None,
) -> Fields:
    return fake_segmentation(mask, cu_seqlens, capacity)
