"""The latent transformer in steps: a row takes one when a patch of it closes."""

from __future__ import annotations

import torch

from ..model.blt import LatentTransformer
from ..model.transformer import plan_attention
from .caches import FIRST_CAPACITY, Recording, Rotations, attend_to
from .fused import step_layers


class _RowsPlan:
    """A plan for one new patch of some rows.

    Rows attend one by one, each to a view of its own patches: a batch would need copies of what they remember, padded
    to the longest.
    """

    def __init__(
        self, rotation: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: list[int], lengths: list[int]
    ):
        self.rotation, self.keys, self.values, self.rows, self.lengths = rotation, keys, values, rows, lengths

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attended = []
        for i, (row, length) in enumerate(zip(self.rows, self.lengths, strict=True)):
            self.keys[row, length], self.values[row, length] = k[i, 0], v[i, 0]
            seen = slice(row, row + 1), slice(length + 1)
            attended.append(attend_to(q[i : i + 1], self.keys[seen], self.values[seen]))
        return attended[0] if len(attended) == 1 else torch.cat(attended)


class LatentStack:
    """The latent transformer, which remembers all patches of each of B rows.

    Args:
        capacity: patches of a row that there is room for at first. The room is doubled when it is full.
    """

    def __init__(self, model: LatentTransformer, rows: int, device: torch.device, capacity: int | None):
        self.model, self.capacity = model, capacity or FIRST_CAPACITY
        self.step_layers = step_layers(model.layers)
        self.lengths = [0] * rows  # closed patches
        self.rotations = Rotations(model.config.latent, device)
        self.caches: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer [B, capacity, Hkv, E]

    def prefill(self, rows: list[int], patches: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """New sequences in `rows`: patches [R, C, K*d], of which `lengths` [R] are closed -> [R, C, D].

        What comes after the closed patches is not remembered.
        """
        self._grow(max(lengths))
        x = self.model.token_embedding_projection(patches).type_as(patches)
        plan = Recording(plan_attention(self.model.config.latent, x, None))
        for number, layer in enumerate(self.model.layers):
            x = layer(x, plan)
            if number == len(self.caches):
                shape = (len(self.lengths), self.capacity, *plan.k.shape[2:])
                self.caches.append((plan.k.new_zeros(shape), plan.v.new_zeros(shape)))
            for cache, new in zip(self.caches[number], (plan.k, plan.v), strict=True):
                for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                    cache[row, :length] = new[i, :length]
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        return x

    def step(self, rows: list[int], patches: torch.Tensor) -> torch.Tensor:
        """One more closed patch of each of `rows`: patches [R, 1, K*d] -> [R, 1, D]."""
        lengths = [self.lengths[row] for row in rows]
        longest = max(lengths) + 1
        self._grow(longest)
        x = self.model.token_embedding_projection(patches).type_as(patches)
        rotation = self.rotations.at(torch.tensor(lengths, device=x.device), longest)
        for layer, (keys, values) in zip(self.step_layers, self.caches, strict=True):
            x = layer(x, _RowsPlan(rotation, keys, values, rows, lengths))
        for row in rows:
            self.lengths[row] += 1
        return x

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.lengths = [self.lengths[row] for row in rows]
        self.caches = [(keys[rows], values[rows]) for keys, values in self.caches]

    def _grow(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        self.capacity = max(needed, 2 * self.capacity)
        self.caches = [(self._grown(keys), self._grown(values)) for keys, values in self.caches]

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        new = old.new_zeros((old.shape[0], self.capacity, *old.shape[2:]))
        new[:, : old.shape[1]] = old
        return new
