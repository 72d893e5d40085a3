"""PatchLayout: the one description of which bytes belong to which patch."""

from __future__ import annotations

import dataclasses

import torch
import torch.utils._pytree as pytree


@dataclasses.dataclass(frozen=True)
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


_FIELDS = tuple(field.name for field in dataclasses.fields(PatchLayout))

pytree.register_dataclass(PatchLayout, field_names=list(_FIELDS), drop_field_names=[])
