"""The entropy model in steps, and in steps whose entropies are those of a full pass to the bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..model import EntropyModel
from ..model.config import TransformerConfig
from ..model.transformer import attend, plan_attention
from ..ops.linear_entropy import linear_entropy
from .caches import LocalStack, Recording, Rotations
from .fused import rms_norm
from .history import History

_ROWS = 8  # Rows of a matrix product have the same bits in every product of a multiple of so many rows.


class EntropyStepper:
    """The entropy model of B rows. With `exact` it is slower, and its entropies have the bits of a full pass."""

    def __init__(self, model: EntropyModel, rows: int, *, exact: bool):
        self.model = model
        device = model.lm_head.weight.device
        self.stack: LocalStack | ExactStack
        if exact and model.config.transformer.window is not None:
            self.stack = ExactStack(model.layers, model.config.transformer, rows, device)
        else:
            self.stack = LocalStack(model.layers, model.config.transformer, rows, device)
        self.history = History(rows, 1, device)

    def prefill(self, rows: list[int], tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """New sequences in `rows`: tokens [R, N], padded on the right -> entropies, float32 [R, N]."""
        for i, row in enumerate(rows):
            self.history.fill(row, tokens[i, : lengths[i]])
        x = self.stack.prefill(rows, self.model.embed_tokens(tokens), lengths)
        return self._entropies(x)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One more token of every row: [B] -> entropies, float32 [B]."""
        x = self.model.embed_tokens(self.history.add(tokens))[:, -1:]
        x = self.stack.step(x)
        if isinstance(self.stack, ExactStack):
            return self._entropies(x)[:, 0]
        return linear_entropy(rms_norm(self.model.norm, x[:, 0]), self.model.lm_head.weight)

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.stack.keep(rows)
        self.history.keep(rows)

    def _entropies(self, x: torch.Tensor) -> torch.Tensor:
        return linear_entropy(self.model.norm(x), self.model.lm_head.weight)


class _BlockPlan:
    """A plan for one new position of each row in the shape that a full pass gives it.

    A full pass attends in blocks of half a window, each of which sees itself and the two blocks before it. The position
    takes its place in such a block of queries, whose others are zeros.
    """

    def __init__(
        self,
        rotation: torch.Tensor,
        mask: torch.Tensor,
        places: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
    ):
        self.rotation, self.mask, self.places, self.keys, self.values = rotation, mask, places, keys, values

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, place = self.places
        block = self.mask.shape[2]
        count = len(rows)  # what comes after them is padding
        self.keys[rows, 2 * block + place], self.values[rows, 2 * block + place] = k[:count, 0], v[:count, 0]
        queries = q.new_zeros((count, block, *q.shape[2:]))
        queries[rows, place] = q[:count, 0]
        heads = (x.transpose(1, 2) for x in (queries, self.keys, self.values))
        y = F.scaled_dot_product_attention(*heads, attn_mask=self.mask).transpose(1, 2)[rows, place]
        return F.pad(y[:, None], (0, 0, 0, 0, 0, 0, 0, len(q) - count))


class ExactStack:
    """Windowed layers whose states have the bits of a full pass over the whole row, if that is longer than the window.

    Two things make bits differ: the number of rows of a matrix product, which is padded here to a multiple of 8, and
    the order in which attention sums, which is kept here by attending in the blocks of the full pass.
    """

    def __init__(self, layers: nn.ModuleList, config: TransformerConfig, rows: int, device: torch.device):
        assert config.window is not None
        self.layers, self.config = layers, config
        self.block = -(-config.window // 2)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = [0] * rows
        self.rotations = Rotations(config, device)
        self.caches: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer [B, 3 * block, H, E]

    def prefill(self, rows: list[int], x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """New sequences in `rows`: x [R, N, dim], padded on the right to N, of which `lengths` [R] are real."""
        block, length = self.block, x.shape[1]
        assert self.config.window is not None
        # Longer than the window, so that attention is windowed, and whole blocks of a multiple of 8 rows.
        unit = block * _ROWS
        padded = -(-max(length, self.config.window + 1) // unit) * unit
        x = F.pad(x, (0, 0, 0, padded - length))
        plan = Recording(plan_attention(self.config, x, None))
        for number, layer in enumerate(self.layers):
            x = layer(x, plan)
            if number == len(self.caches):
                shape = (len(self.lengths), 3 * block, *plan.k.shape[2:])
                self.caches.append((plan.k.new_zeros(shape), plan.v.new_zeros(shape)))
            for cache, new in zip(self.caches[number], (plan.k, plan.v), strict=True):
                for i, (row, count) in enumerate(zip(rows, lengths, strict=True)):
                    begin = (count - 1) // block * block - 2 * block  # of the three blocks of the latest position
                    cache[row] = 0
                    cache[row, max(0, -begin) : count - begin] = new[i, max(0, begin) : count]
        for row, count in zip(rows, lengths, strict=True):
            self.lengths[row] = self.positions[row] = count
        return x[:, :length]

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One more position of every row: x [B, 1, dim] -> [B, 1, dim]."""
        count, block = len(x), self.block
        begun = [row for row, length in enumerate(self.lengths) if length % block == 0]
        if begun:  # these rows begin a block, and forget the oldest of the three
            for caches in self.caches:
                for cache in caches:
                    cache[begun] = F.pad(cache[begun][:, block:], (0, 0, 0, 0, 0, block))
        rotation = self.rotations.at(self.positions, max(self.lengths) + 1)
        padding = -count % _ROWS
        rotation = F.pad(rotation, (0, 0) * 4 + (0, padding))
        x = F.pad(x, (0, 0, 0, 0, 0, padding))
        places = torch.arange(count, device=x.device), self.positions % block
        mask = self._mask()
        for layer, (keys, values) in zip(self.layers, self.caches, strict=True):
            x = layer(x, _BlockPlan(rotation, mask, places, keys, values))
        self.positions += 1
        self.lengths = [length + 1 for length in self.lengths]
        return x[:count]

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.caches = [(keys[rows], values[rows]) for keys, values in self.caches]
        self.positions, self.lengths = self.positions[rows], [self.lengths[row] for row in rows]

    def _mask(self) -> torch.Tensor:
        """bool [B, 1, block, 3 * block]: what each query of the block of the new positions would see."""
        block, device = self.block, self.positions.device
        queries = torch.arange(2 * block, 3 * block, device=device)[:, None]
        keys = torch.arange(3 * block, device=device)
        distance = queries - keys
        near = (distance >= 0) & (distance < self.config.window)
        begin = self.positions // block * block - 2 * block
        return (near & (keys + begin[:, None, None] >= 0))[:, None]
