"""What attention layers remember of each row, and how they attend to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..model.config import TransformerConfig
from ..model.transformer import AttentionPlan, make_rotation, plan_attention
from .fused import step_layers

FIRST_CAPACITY = 64  # entries of a cache that grows; it doubles when it is full

# What happens to x [B, L, dim] before the layer of this number.
Before = Callable[[int, torch.Tensor], torch.Tensor]


def _nothing(number: int, x: torch.Tensor) -> torch.Tensor:
    return x


def attend_to(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of q [B, N, H, E] to k and v [B, L, Hkv, E] -> [B, N, H, E]; scores get `mask` [B, 1, 1, L] added."""
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


class Ring:
    """The latest entries of each of B rows, [B, capacity, ...]; all rows write to the same place.

    The newest entry of every row is at `slot - 1`, the one before it at `slot - 2`, and so on around the ring. So rows
    of any lengths take one copy to write, and what is older than the capacity is forgotten by itself.
    """

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity, self.slot = rows, capacity, 0
        self.entries: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """One entry [B, ...] of every row."""
        entries = self._allocated(x)
        entries[:, self.slot] = x
        self.slot = (self.slot + 1) % self.capacity

    def fill(self, row: int, x: torch.Tensor) -> None:
        """The entries [n, ...] of a row, oldest first, in place of what it had."""
        entries = self._allocated(x)
        x = x[max(0, x.shape[0] - self.capacity) :]
        entries[row, self.places(x.shape[0])] = x

    def last(self, row: int, count: int) -> torch.Tensor:
        """The latest `count` entries of a row, [count, ...], oldest first."""
        assert self.entries is not None
        if self.slot >= count:
            return self.entries[row, self.slot - count : self.slot]
        return self.entries[row, self.places(count)]

    def places(self, count: int) -> torch.Tensor:
        """int64 [count]: where the latest `count` entries are, oldest first."""
        return torch.arange(self.slot - count, self.slot) % self.capacity

    def grow(self, needed: int) -> None:
        """Makes room for `needed` entries, and for twice as many as there was room for."""
        if needed <= self.capacity:
            return
        before, self.capacity = self.capacity, max(needed, 2 * self.capacity)
        if self.entries is not None:
            old = self.entries.roll(-self.slot, 1)
            self.entries = old.new_zeros((self.rows, self.capacity, *old.shape[2:]))
            self.entries[:, -before:] = old
        self.slot = 0

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.rows = len(rows)
        if self.entries is not None:
            self.entries = self.entries[rows]

    def _allocated(self, x: torch.Tensor) -> torch.Tensor:
        if self.entries is None:
            # Zeros, because what is masked is multiplied by 0 all the same, and NaN would stay NaN.
            self.entries = x.new_zeros((self.rows, self.capacity, *x.shape[1:]))
        return self.entries


class Recording:
    """A plan that attends as another one does and remembers the keys and values, [R, N, Hkv, E]."""

    def __init__(self, plan: AttentionPlan):
        self.plan, self.rotation = plan, plan.rotation

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.k, self.v = k, v
        return self.plan.attend(q, k, v)


class Rotations:
    """The rotary angles of positions, looked up in a table that grows with the longest row."""

    def __init__(self, config: TransformerConfig, device: torch.device):
        self.config, self.device = config, device
        self.table = self._make(FIRST_CAPACITY)

    def at(self, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """[B, 1, 1, E/2, 2] of positions int64 [B], which are all below `longest`."""
        if longest > self.table.shape[0]:
            self.table = self._make(max(longest, 2 * self.table.shape[0]))
        return self.table[positions][:, None]

    def _make(self, length: int) -> torch.Tensor:
        return make_rotation(self.config, torch.arange(length, device=self.device))


class _StepPlan:
    """A plan for one new position of each row: its key and value go into the rings, and it attends to what is there."""

    def __init__(self, rotation: torch.Tensor, keys: Ring, values: Ring, mask: torch.Tensor | None):
        self.rotation, self.keys, self.values, self.mask = rotation, keys, values, mask

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.keys.add(k[:, 0])
        self.values.add(v[:, 0])
        assert self.keys.entries is not None and self.values.entries is not None
        return attend_to(q, self.keys.entries, self.values.entries, self.mask)


class LocalStack:
    """Layers over bytes whose keys and values are remembered within their window, or all of them where they have none.

    All rows take a step together. `lengths`, the positions that each row has seen, are counted here.
    """

    def __init__(self, layers: nn.ModuleList, config: TransformerConfig, rows: int, device: torch.device):
        self.layers, self.step_layers, self.window = layers, step_layers(layers), config.window
        capacity = config.window or FIRST_CAPACITY
        self.rings = [(Ring(rows, capacity), Ring(rows, capacity)) for _ in layers]
        self.lengths = [0] * rows
        self.config, self.device = config, device
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rotations = Rotations(config, device)
        # What each row sees of its ring, as numbers to add to the scores.
        self.mask = torch.full((rows, 1, 1, capacity), -torch.inf, device=device)

    def prefill(self, rows: list[int], x: torch.Tensor, lengths: list[int], before: Before = _nothing) -> torch.Tensor:
        """New sequences in `rows`: x [R, N, dim], padded on the right to N, of which `lengths` [R] are real."""
        plan = Recording(plan_attention(self.config, x, None))
        self._grow(max(lengths))
        for number, (layer, (keys, values)) in enumerate(zip(self.layers, self.rings, strict=True)):
            x = layer(before(number, x), plan)
            for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                keys.fill(row, plan.k[i, :length])
                values.fill(row, plan.v[i, :length])
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = self.positions[row] = length
            self.mask[row] = -torch.inf
            ring = self.rings[0][0]
            self.mask[row, 0, 0, ring.places(min(length, ring.capacity))] = 0
        return x

    def step(self, x: torch.Tensor, before: Before = _nothing) -> torch.Tensor:
        """One more position of every row: x [B, 1, dim] -> [B, 1, dim]."""
        longest = max(self.lengths) + 1
        self._grow(longest)
        ring = self.rings[0][0]
        mask = None
        if min(self.lengths) < ring.capacity:
            self.mask[..., ring.slot] = 0
            mask = self.mask.to(x.dtype)
        rotation = self.rotations.at(self.positions, longest)
        for number, (layer, (keys, values)) in enumerate(zip(self.step_layers, self.rings, strict=True)):
            x = layer(before(number, x), _StepPlan(rotation, keys, values, mask))
        self.positions += 1
        self.lengths = [length + 1 for length in self.lengths]
        return x

    def forget(self, rows: list[int]) -> None:
        """The next positions of `rows` begin sequences."""
        self.mask[rows] = -torch.inf
        self.positions[rows] = 0
        for row in rows:
            self.lengths[row] = 0

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        for keys, values in self.rings:
            keys.keep(rows)
            values.keep(rows)
        self.lengths = [self.lengths[row] for row in rows]
        self.positions, self.mask = self.positions[rows], self.mask[rows]

    def _grow(self, needed: int) -> None:
        ring = self.rings[0][0]
        if self.window is not None or needed <= ring.capacity:
            return
        old = self.mask.roll(-ring.slot, -1)
        for keys, values in self.rings:
            keys.grow(needed)
            values.grow(needed)
        self.mask = F.pad(old, (ring.capacity - old.shape[-1], 0), value=-torch.inf)
