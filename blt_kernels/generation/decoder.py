"""The local decoder in steps."""

from __future__ import annotations

import torch

from ..layout import PatchLayout
from ..model.decoder import LocalDecoder
from .caches import LocalStack
from .cross_attention import cross_attend, keys_and_values
from .fused import rms_norm


class DecoderStepper:
    """The decoder, which remembers its window of bytes, and the slots of the patch that each row closed last.

    A byte reads these K slots and no others, so their keys and values are computed once a patch.
    """

    def __init__(self, model: LocalDecoder, rows: int, device: torch.device):
        self.model, self.rows = model, rows
        self.stack = LocalStack(model.layers, model.config.decoder, rows, device)
        self.slots: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer keys and values [B, K, Hkv, E]

    def prefill(
        self, rows: list[int], x: torch.Tensor, patches: torch.Tensor, layout: PatchLayout, lengths: list[int]
    ) -> torch.Tensor:
        """New sequences in `rows`: byte states x [R, N, d] and latent patches [R, C, D] -> [R, N, d], normalised."""
        slots = self._slots(patches, x)

        def read_patches(number: int, x: torch.Tensor) -> torch.Tensor:
            # The published residual is added twice.
            return torch.add(self.model.cross_attn_layers[number](x, slots, layout), x, alpha=2)

        return self.model.norm(self.stack.prefill(rows, x, lengths, read_patches))

    def show(self, rows: list[int], patches: torch.Tensor, x: torch.Tensor) -> None:
        """From now on the bytes of `rows` read these patches [R, 1, D]; x is any tensor of byte states."""
        slots = self._slots(patches, x)
        for number, cross in enumerate(self.model.cross_attn_layers):
            new = keys_and_values(cross, slots)
            if number == len(self.slots):
                k, v = (part.new_zeros((self.rows, *part.shape[1:])) for part in new)
                self.slots.append((k, v))
            for old, part in zip(self.slots[number], new, strict=True):
                if len(rows) == 1:
                    old[rows[0]] = part[0]  # in half the time of a list of rows
                else:
                    old[rows] = part

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One more byte of every row: x [B, 1, d] -> [B, 1, d], normalised."""
        return rms_norm(self.model.norm, self.stack.step(x, self._read_slots))

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.rows = len(rows)
        self.stack.keep(rows)
        self.slots = [(keys[rows], values[rows]) for keys, values in self.slots]

    def _read_slots(self, number: int, x: torch.Tensor) -> torch.Tensor:
        cross = self.model.cross_attn_layers[number]
        return cross_attend(cross, x, *self.slots[number])

    def _slots(self, patches: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Latent patches [R, C, D] -> [R, C*K, d] in the dtype of x."""
        slots = self.model.patch_embedding_projection(patches).type_as(x)
        return slots.unflatten(-1, (-1, x.shape[-1])).flatten(1, 2)
