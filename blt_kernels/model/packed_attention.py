"""Causal attention within the sequences of one packed row, without a mask of all pairs of positions.

`plan_packed` says how it is computed where the row is: on CUDA by `torch.nn.attention.varlen`, on the CPU in buckets of
sequences of similar length. Where neither can be (see there) a dense mask stands for both, in `transformer.py`, and is
what the tests compare them with.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .._autograd import autocast_dtype
from .._checks import can_look_at
from ..layout import Take

try:
    from torch.nn.attention.varlen import varlen_attn

    _varlen_attn: Callable[..., Any] | None = varlen_attn
except ImportError:  # a build of torch without it
    _varlen_attn = None

_VARLEN_DTYPES = (torch.bfloat16, torch.float16)  # of the FlashAttention kernels behind it
_LARGEST_HEAD = 256
_OLDEST_CAPABILITY = (8, 0)

# Sequences of a bucket are padded to its longest, so that its others are at least this share as long. The first of
# these that keeps all slots within MOST_SLOTS of those in use is taken: few large products are faster than many small.
_SHARES = (0.5, 0.65, 0.8)
MOST_SLOTS = 1.3


@dataclasses.dataclass(frozen=True)
class Varlen:
    """Attention by variable-length kernels, which read where sequences begin.

    Attributes:
        cu_seqlens: int32 [S+1], on the device.
        is_tail: bool [L, 1, 1], the positions after the last sequence.
        longest: of the sequences, at least; a number of the host, since the kernels are launched by it.
    """

    cu_seqlens: torch.Tensor
    is_tail: torch.Tensor
    longest: int

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [1, L, H, E] -> [1, L, H, E], 0 in the tail."""
        # The kernels write nothing to the tail of what they allocate, neither forward nor backward, and a NaN that was
        # in that memory would reach the gradients of weights. Filling stops it both ways.
        q, k, v = (x[0].masked_fill(self.is_tail, 0) for x in (q, k, v))
        y = call_varlen(_varlen_attn, q, k, v, self.cu_seqlens, self.longest)
        return y.masked_fill(self.is_tail, 0)[None]


def call_varlen(
    varlen: Callable[..., Any] | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """Causal `varlen_attn`: torch 2.10 has the argument is_causal, and later versions a window in its place."""
    assert varlen is not None
    has_flag = "is_causal" in inspect.signature(varlen).parameters
    causal: dict[str, Any] = {"is_causal": True} if has_flag else {"window_size": (-1, 0)}
    return varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **causal)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Attention of padded batches of similar sequences. They are cut out of the row for this product alone.

    Attributes:
        shapes: (sequences, positions of each) of every bucket.
        to_slots: for each slot of all buckets its position in the row, and whether it has one.
        to_row: for each position of the row its slot, and whether it has one.
    """

    shapes: tuple[tuple[int, int], ...]
    to_slots: tuple[torch.Tensor, torch.Tensor]
    to_row: tuple[torch.Tensor, torch.Tensor]

    @property
    def num_slots(self) -> int:
        return sum(count * width for count, width in self.shapes)

    @staticmethod
    def of(cu_seqlens: Sequence[int], length: int) -> Buckets:
        """The buckets of the sequences (at least one) between `cu_seqlens` of a row of `length` positions."""
        sequences = sorted(
            ((end - begin, begin) for begin, end in itertools.pairwise(cu_seqlens) if end > begin),
            reverse=True,
        )
        used = sum(size for size, _ in sequences)
        for share in _SHARES:
            groups = _groups(sequences, share)
            if sum(len(group) * group[0][0] for group in groups) <= MOST_SLOTS * used:
                break
        positions, filled = [], []
        for group in groups:
            slot = torch.arange(group[0][0])
            sizes, begins = torch.tensor(group).T[..., None]
            positions.append((begins + slot).flatten())
            filled.append((slot < sizes).flatten())
        position, is_filled = torch.cat(positions), torch.cat(filled)
        slots = torch.zeros(length, dtype=torch.int64)
        is_used = torch.zeros(length, dtype=torch.bool)
        slots[position[is_filled]] = is_filled.nonzero().squeeze(1)
        is_used[position[is_filled]] = True
        shapes = tuple((len(group), group[0][0]) for group in groups)
        return Buckets(shapes, (position.where(is_filled, 0), is_filled), (slots, is_used))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [1, L, H, E] -> [1, L, H, E], 0 after the last sequence."""
        sizes = [count * width for count, width in self.shapes]
        # Padding follows a sequence, so that its positions do not see it, and its own results are dropped.
        q, k, v = (Take.apply(x[0], *self.to_slots, *self.to_row) for x in (q, k, v))
        attended = []
        for shape, *operands in zip(self.shapes, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
            q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in operands)  # [sequences, H, positions, E]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            attended.append(y.transpose(1, 2).flatten(0, 1))
        return Take.apply(torch.cat(attended), *self.to_row, *self.to_slots)[None]


def _groups(sequences: list[tuple[int, int]], share: float) -> list[list[tuple[int, int]]]:
    """Sequences (length, begin), longest first, in groups whose members are at least `share` as long as the first."""
    groups: list[list[tuple[int, int]]] = []
    for sequence in sequences:
        if groups and sequence[0] >= share * groups[-1][0][0]:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def plan_packed(
    x: torch.Tensor, cu_seqlens: torch.Tensor, longest: int | None, head_dim: int
) -> Varlen | Buckets | None:
    """How the sequences of a packed row x [1, L, dim] attend; None where only a dense mask can do it.

    That is on CUDA in fp32, with heads or on a device that FlashAttention does not have; on the CPU where the values of
    `cu_seqlens` cannot be read, as under torch.compile, whose graphs need shapes that do not depend on them; and where
    there is no sequence.

    Args:
        longest: no sequence has more positions; None: L.
    """
    if x.device.type == "cpu" and can_look_at(cu_seqlens):
        cu = cu_seqlens.tolist()
        return Buckets.of(cu, x.shape[1]) if cu[-1] > 0 else None
    if x.device.type != "cuda" or _varlen_attn is None:
        return None
    dtype = autocast_dtype(x.device) if x.dtype == torch.float32 else x.dtype
    has_kernel = dtype in _VARLEN_DTYPES and head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD
    if not has_kernel or torch.cuda.get_device_capability(x.device) < _OLDEST_CAPABILITY:
        return None
    is_tail = torch.arange(x.shape[1], device=x.device) >= cu_seqlens[-1]
    return Varlen(cu_seqlens.int(), is_tail[:, None, None], min(x.shape[1], longest or x.shape[1]))
