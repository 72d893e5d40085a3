"""PatchLayout: the one description of which bytes belong to which patch."""

from __future__ import annotations

import dataclasses

import torch
import torch.utils._pytree as pytree


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PatchLayout:
    """Which bytes belong to which patch, for a padded batch or for sequences packed in one row.

    Made by `segment*`, `from_lengths` and `from_starts`; making and using one needs no host sync. All tensors are
    int32 and on one device. B rows, N bytes a row, C slots (capacity) a row, S sequences (S = B when padded; when
    packed, B = 1 and S = len(cu_seqlens) - 1).

    Attributes:
        offsets: [B, C+1]. Patch c of row b is bytes `offsets[b, c] .. offsets[b, c+1] - 1`; empty slots are allowed,
            and `offsets[b, 0]` may exceed 0 (left padding).
        patch_ids: [B, N]. The patch of each byte; -1 where a byte is in none.
        visible_ids: [B, N]. The last patch finished at or before this byte, in the same sequence; -1 if none:
            patch(i + 1) - 1 of published BLT, so inner empty slots count.
        num_patches: [B]. 1 + the last non-empty slot.
        cu_patches: [S+1]. Exclusive cumulative sum of the used slots of each sequence: the latent model's cu_seqlens.
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
        from .ops import layout as ops  # the ops need this class

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
        from .ops import layout as ops  # the ops need this class

        return cls(*ops.from_starts(mask, seq_lens, cu_seqlens, next_is_start, capacity))

    def __repr__(self) -> str:
        return (
            f"PatchLayout(B={self.offsets.shape[0]}, N={self.num_bytes}, C={self.capacity}, "
            f"S={self.cu_patches.shape[0] - 1}, device='{self.offsets.device}')"
        )

    def lengths(self) -> torch.Tensor:
        """int64 [B, C]: bytes of each patch, 0 for an empty slot."""
        return self.offsets.diff(dim=1).long()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PatchLayout:
        """The layout on `device`; itself where it already is there."""
        return PatchLayout(*(getattr(self, name).to(device, non_blocking=non_blocking) for name in _FIELDS))


_FIELDS = tuple(field.name for field in dataclasses.fields(PatchLayout))

pytree.register_dataclass(PatchLayout, field_names=list(_FIELDS), drop_field_names=[])
