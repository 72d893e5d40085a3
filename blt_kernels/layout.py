"""PatchLayout: the one description of which bytes belong to which patch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, int32, strided

from ._checks import check_device, check_int, check_shape, check_tensor, check_values, fail_type, fail_value


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PatchLayout:
    """Which bytes belong to which patch, for a padded batch or for sequences packed in one row.

    Made by `segment*`, `from_lengths` and `from_starts`; making and using one needs no host sync. All tensors are
    int32 and on one device. B rows, N bytes a row, C slots (capacity) a row, S sequences (S = B when padded; when
    packed, B = 1 and S = len(cu_seqlens) - 1). A pytree; two layouts are equal only if they are the same object.

    Attributes:
        offsets: [B, C+1]. Patch c of row b is bytes `offsets[b, c] .. offsets[b, c+1] - 1`; empty slots are allowed,
            and `offsets[b, 0]` may exceed 0 (left padding).
        patch_ids: [B, N]. The patch of each byte; -1 where a byte is in none.
        visible_ids: [B, N]. The last patch finished at or before this byte, in the same sequence; -1 if none, and
            where a byte is in no patch. Literally patch(i + 1) - 1 of published BLT, so inner empty slots count. The
            last byte of a sequence sees its own patch if the next, unseen byte is known to start one, else the slot
            before.
        num_patches: [B]. 1 + the last non-empty slot.
        cu_patches: [S+1]. Exclusive cumulative sum of the used slots of each sequence: the latent model's cu_seqlens.
            Empty slots between two packed sequences belong to the earlier one.
        overflow: [B]. Patch starts that did not fit into the capacity and were merged.
    """

    offsets: torch.Tensor
    patch_ids: torch.Tensor
    visible_ids: torch.Tensor
    num_patches: torch.Tensor
    cu_patches: torch.Tensor
    overflow: torch.Tensor

    @property
    def capacity(self) -> int:
        """C: slots a row."""
        return self.offsets.shape[1] - 1

    @property
    def num_bytes(self) -> int:
        """N: bytes a row, padding included."""
        return self.patch_ids.shape[1]

    @classmethod
    def from_lengths(
        cls,
        lengths: torch.Tensor,
        num_bytes: int | None = None,
        *,
        seq_lens: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        next_is_start: torch.Tensor | None = None,
    ) -> PatchLayout:
        """The layout of patches of these lengths, one after the other from byte 0 of each row; C = P.

        With n real bytes in a row, lengths that sum to n leave the last patch open. A sum of n + 1 adds the next,
        unseen byte (the published code's `include_next_token`): alone in its slot it closes the patch before, and its
        slot stays empty. With a sum below n the rest of the bytes belongs to no patch; what lies beyond n + 1 is cut
        off.

        Args:
            lengths: [B, P] int32 or int64. Zeros are empty slots. Negative lengths count as 0, since the rows that
                Hugging Face transformers makes end in -1.
            num_bytes: N; default the largest sum, for CPU tensors outside torch.compile only.
            seq_lens: [B] int32 or int64: bytes of each row that are real (default N).
            cu_seqlens: [S+1] int32 or int64, B = 1: byte offsets of packed sequences, from 0; may end in repeats and
                before N. Each must begin where a patch does. Only the last sequence can have the unseen byte.
            next_is_start: bool [S]: whether the unseen byte after each sequence starts a patch. Overrides the lengths.

        Raises:
            TypeError, ValueError: wrong argument.
            ValueError, RuntimeError (CPU): sums above N + 1, a patch that spans two sequences, seq_lens or cu_seqlens
                out of range or decreasing.
        """
        from .ops import layout as ops  # at call time: the reference ops need this class

        return cls(*ops.from_lengths(lengths, num_bytes, seq_lens, cu_seqlens, next_is_start))

    @classmethod
    def from_starts(
        cls,
        mask: torch.Tensor,
        *,
        seq_lens: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        next_is_start: torch.Tensor | None = None,
        capacity: int | None = None,
    ) -> PatchLayout:
        """The layout of patches that start where `mask` is True.

        Bytes before the first start of a padded row belong to no patch (left padding). With `cu_seqlens` the first byte
        of every sequence starts a patch, whatever the mask says.

        Args:
            mask: [B, N] bool.
            seq_lens, cu_seqlens, next_is_start: see `from_lengths`. Without `next_is_start` the last patch is open.
            capacity: C; default N, where every start has a slot of its own. Start j (from 0) of sequence s of S in a
                row takes slot min(j, C - S + s): where patches outnumber slots the later ones merge, no byte is lost
                and no patch spans two sequences.

        Raises:
            TypeError, ValueError: wrong argument; in particular a capacity below the number of sequences in a row.
            ValueError, RuntimeError (CPU): seq_lens or cu_seqlens out of range or decreasing.
        """
        from .ops import layout as ops  # at call time: the reference ops need this class

        return cls(*ops.from_starts(mask, seq_lens, cu_seqlens, next_is_start, capacity))

    def __repr__(self) -> str:
        return (
            f"PatchLayout(B={self.offsets.shape[0]}, N={self.num_bytes}, C={self.capacity}, "
            f"S={self.cu_patches.shape[0] - 1}, device={str(self.offsets.device)!r})"
        )

    def lengths(self) -> torch.Tensor:
        """int64 [B, C]: bytes of each patch, 0 for an empty slot."""
        return self.offsets.diff(dim=1).long()

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PatchLayout:
        """The layout on `device`, its tensors shared where they are there already."""
        if not isinstance(device, (torch.device, str, int)) or isinstance(device, bool):
            raise fail_type("PatchLayout.to", "device", "a device", repr(device))
        return PatchLayout(*(field.to(device, non_blocking=non_blocking) for field in self._fields()))

    def copy_(self, other: PatchLayout) -> PatchLayout:
        """Copies `other`, of equal B, N, C and S, into the tensors of this layout: for CUDA-graph replay."""
        if not isinstance(other, PatchLayout):
            raise fail_type("PatchLayout.copy_", "other", "a PatchLayout", type(other).__name__)
        for name, to, from_ in zip(_FIELDS, self._fields(), other._fields(), strict=True):
            check_shape("PatchLayout.copy_", f"other.{name}", from_, to.shape)
        for to, from_ in zip(self._fields(), other._fields(), strict=True):
            to.copy_(from_)
        return self

    def trim(self, multiple_of: int = 1) -> PatchLayout:
        """The same patches in the smallest C that is a multiple of `multiple_of` and holds them all. One sync."""
        check_int("PatchLayout.trim", "multiple_of", multiple_of, 1)
        check_values("PatchLayout.trim", "num_patches", self.num_patches)
        most = int(self.num_patches.max()) if self.num_patches.shape[0] else 0
        capacity = -(-most // multiple_of) * multiple_of
        missing = max(0, capacity - self.capacity)
        offsets = torch.cat([self.offsets, self.offsets[:, -1:].expand(-1, missing)], dim=1)[:, : capacity + 1]
        return dataclasses.replace(self, offsets=offsets.contiguous())

    def pack(self, y: torch.Tensor, total: int | None = None) -> torch.Tensor:
        """[B, C, ...] -> [1, total, ...]: the used slots of all rows, one after the other, as `cu_patches` counts them.

        Args:
            y: one entry a slot.
            total: length of the result; default the number of used slots, which takes one sync. A larger one gives
                zeros at the end, without a sync. With a smaller one the last patches are dropped.

        Differentiable; unused slots get gradient 0.
        """
        op = "PatchLayout.pack"
        check_tensor(op, "y", y)
        check_shape(op, "y", y, (*self.offsets[:, 1:].shape, *y.shape[2:]))
        check_device(op, "y", y, self.offsets.device, "the layout")
        if total is None:
            check_values(op, "num_patches", self.num_patches)
            total = int(self.num_patches.sum())
        check_int(op, "total", total, 0)
        if y.shape[0] * y.shape[1] == 0:
            return y.new_zeros(1, total, *y.shape[2:])
        to_packed, to_slots = self._packing(total)
        return Take.apply(y.flatten(0, 1), *to_packed, *to_slots).unsqueeze(0)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, total, ...] -> [B, C, ...]: the inverse of `pack`, with zeros in the unused slots. Differentiable."""
        op = "PatchLayout.unpack"
        check_tensor(op, "packed", packed)
        check_shape(op, "packed", packed, (1, None, *packed.shape[2:]))
        check_device(op, "packed", packed, self.offsets.device, "the layout")
        slots = self.offsets[:, 1:].shape
        if packed.shape[1] == 0:
            return packed.new_zeros(*slots, *packed.shape[2:])
        to_packed, to_slots = self._packing(packed.shape[1])
        return Take.apply(packed.squeeze(0), *to_slots, *to_packed).unflatten(0, slots)

    def _packing(self, total: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Where each packed row comes from and each of the B * C slots goes: indices, and which of them are used."""
        batch, capacity = self.offsets.shape[0], self.capacity
        begin = F.pad(self.num_patches.long().cumsum(0), (1, 0))  # [B+1], of each row in the packed order
        packed = torch.arange(total, device=begin.device)
        row = torch.searchsorted(begin[1:], packed, right=True).clamp(max=batch - 1)
        is_patch = packed < begin[-1]
        slot = torch.arange(capacity, device=begin.device)
        target = (begin[:-1, None] + slot).flatten()
        is_used = (slot < self.num_patches[:, None]).flatten() & (target < total)
        source = row * capacity + packed - begin[row]
        return (source.where(is_patch, 0), is_patch), (target.where(is_used, 0), is_used)

    def validate(self) -> PatchLayout:
        """Checks every promise of the fields, and returns the layout. Syncs.

        Raises:
            TypeError, ValueError: naming field, row and slot (or byte, or sequence) of the first broken promise.
        """
        _validate(self)
        return self

    def _fields(self) -> tuple[torch.Tensor, ...]:
        """The tensors, in the order of _FIELDS."""
        return (
            self.offsets,
            self.patch_ids,
            self.visible_ids,
            self.num_patches,
            self.cu_patches,
            self.overflow,
        )


_FIELDS = tuple(field.name for field in dataclasses.fields(PatchLayout))

pytree.register_dataclass(
    PatchLayout,
    field_names=list(_FIELDS),
    drop_field_names=[],
    serialized_type_name="blt_kernels.PatchLayout",  # torch.export.save
)
torch.serialization.add_safe_globals([PatchLayout])  # torch.load(weights_only=True)


def check_layout(op: str, layout: Any, device: torch.device, owner: str) -> tuple[int, int, int]:
    """`layout` is a PatchLayout whose tensors have the promised dtype and shapes, and lie on `device`, as `owner` does.

    Their values are not looked at: see `PatchLayout.validate`. Returns B, N and C.
    """
    if not isinstance(layout, PatchLayout):
        raise fail_type(op, "layout", "a PatchLayout", type(layout).__name__)
    offsets, own, visible, num_patches, cu_patches, overflow = fields = layout._fields()
    # Nearly all layouts pass these questions. The checks below, which find out what is wrong, take four times as long.
    for x in fields:
        if type(x) is not Tensor or x.dtype is not int32 or x.layout is not strided or x.device != device:
            break
    else:
        slots, bytes_ = offsets.shape, own.shape
        if (
            len(slots) == len(bytes_) == 2
            and slots[1] >= 1
            and bytes_[0] == slots[0]
            and visible.shape == bytes_
            and num_patches.shape == slots[:1]
            and cu_patches.dim() == overflow.dim() == 1
        ):
            return slots[0], bytes_[1], slots[1] - 1
    for (name, ndim), x in zip(_NDIMS.items(), fields, strict=True):
        check_tensor(op, f"layout.{name}", x, ndim=ndim, dtypes=(torch.int32,))
        check_device(op, f"layout.{name}", x, device, owner)
    batch, entries = offsets.shape
    check_shape(op, "layout.patch_ids", own, (batch, None))
    check_shape(op, "layout.visible_ids", visible, own.shape)
    check_shape(op, "layout.num_patches", num_patches, (batch,))
    if entries < 1:
        raise fail_value(op, "layout.offsets", "shape (B, C + 1)", f"shape {tuple(offsets.shape)}")
    return batch, own.shape[1], entries - 1


_NDIMS = dict(zip(_FIELDS, (2, 2, 2, 1, 1, 1), strict=True))


class Take(torch.autograd.Function):
    """x[index], and 0 where not `valid`. Its gradient takes by the inverse index, so that it needs no scatter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        index: torch.Tensor,
        valid: torch.Tensor,
        inverse: torch.Tensor,
        inverse_valid: torch.Tensor,
    ) -> torch.Tensor:
        out = x.index_select(0, index)
        return out.masked_fill_(~valid.view(-1, *[1] * (x.dim() - 1)), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        index, valid, inverse, inverse_valid = ctx.saved_tensors
        return Take.apply(grad, inverse, inverse_valid, index, valid), None, None, None, None


def _validate(layout: PatchLayout) -> None:
    op = "PatchLayout.validate"
    for name, ndim in _NDIMS.items():
        check_tensor(op, name, getattr(layout, name), ndim=ndim, dtypes=(torch.int32,))
        check_device(op, name, getattr(layout, name), layout.offsets.device, "offsets")
    check_values(op, "offsets", layout.offsets)
    offsets, own, visible, num_patches, cu_patches, overflow = (f.to("cpu", torch.int64) for f in layout._fields())
    batch, num_bytes = own.shape
    if offsets.shape[1] < 1:
        raise fail_value(op, "offsets", "shape (B, C + 1)", f"shape {tuple(offsets.shape)}")
    check_shape(op, "patch_ids", own, (offsets.shape[0], None))
    check_shape(op, "visible_ids", visible, own.shape)
    check_shape(op, "num_patches", num_patches, (batch,))
    check_shape(op, "overflow", overflow, (batch,))
    check_shape(op, "cu_patches", cu_patches, (None if batch == 1 and len(cu_patches) else batch + 1,))

    def require(name: str, got: torch.Tensor, good: torch.Tensor, expected: str | torch.Tensor, *axes: str) -> None:
        if not bool(good.all()):
            at = (~good).nonzero()[0].tolist()
            where = ", ".join(f"{axis} {i}" for axis, i in zip(axes, at, strict=True))
            wanted = expected if isinstance(expected, str) else int(expected[tuple(at)])
            raise fail_value(op, name, f"{wanted} in {where}", int(got[tuple(at)]))

    # Offsets rise within the row; everything but the sequences follows from them.
    require("offsets", offsets, (offsets >= 0) & (offsets <= num_bytes), f"0 .. {num_bytes}", "row", "slot")
    ends = offsets[:, 1:]
    require("offsets", ends, ends >= offsets[:, :-1], "an end no smaller than the start", "row", "slot")
    i = torch.arange(num_bytes).expand(batch, -1).contiguous()
    ids = torch.searchsorted(ends.contiguous(), i, right=True)
    ids = ids.where((i >= offsets[:, :1]) & (i < offsets[:, -1:]), -1)
    require("patch_ids", own, own == ids, ids, "row", "byte")
    used = F.pad((ends > offsets[:, :-1]) * torch.arange(1, offsets.shape[1]), (1, 0)).amax(1)
    require("num_patches", num_patches, num_patches == used, used, "row")
    require("overflow", overflow, overflow >= 0, "0 or more", "row")

    # Sequences: the rows, or those of one row. Then each begins at a slot that is not empty, if it is not the first.
    if batch != 1:
        cu = F.pad(used.cumsum(0), (1, 0))
        require("cu_patches", cu_patches, cu_patches == cu, cu, "sequence")
        first = torch.zeros_like(own)
        sequence = first
    else:
        good = (cu_patches >= F.pad(cu_patches[:-1], (1, 0))) & (cu_patches <= used)
        good[0] &= cu_patches[0] == 0
        good[-1] &= cu_patches[-1] == used[0]
        rule = f"values that rise from 0 to num_patches = {int(used[0])}"
        require("cu_patches", cu_patches, good, rule, "sequence")
        empty = F.pad(offsets.diff(dim=1)[0] == 0, (0, 1), value=False)
        good = (cu_patches == 0) | (cu_patches == used) | ~empty[cu_patches]
        require("cu_patches", cu_patches, good, "a slot that is not empty", "sequence")
        sequence = torch.searchsorted(cu_patches[1:].contiguous(), own.contiguous(), right=True)
        first = cu_patches[sequence.clamp(max=len(cu_patches) - 1)]
    after = F.pad(own[:, 1:], (0, 1), value=-1)[:, :num_bytes]
    is_last = (after < 0) | (F.pad(sequence[:, 1:], (0, 1), value=-1)[:, :num_bytes] != sequence)

    def seen(slot: torch.Tensor) -> torch.Tensor:
        return slot.where((slot >= first) & (own >= 0), -1)

    inner = seen(after - 1)
    require("visible_ids", visible, is_last | (visible == inner), inner, "row", "byte")
    good = ~is_last | (visible == seen(own)) | (visible == seen(own - 1))
    require("visible_ids", visible, good, "the byte's own slot or the one before (-1 for none)", "row", "byte")
