"""The entropy model in steps, and in steps whose entropies are those of a full pass to the bit."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..model import EntropyModel
from ..model.config import TransformerConfig
from ..model.transformer import plan_attention
from ..ops.linear_entropy import linear_entropy
from ..tokens import BYTE_OFFSET
from ..training.lines import entropies_of
from .caches import LocalStack, Recording, Rotations
from .fused import rms_norm
from .history import History

NEWLINE = BYTE_OFFSET + ord("\n")
_ROWS = 8  # Rows of a matrix product have the same bits in every product of a multiple of so many rows.


class EntropyStepper:
    """The entropy model of B rows.

    Args:
        exact: entropies have the bits of a full pass; slower.
        reset_at_newline: a row forgets what it has read at the end of each line, as `PatcherConfig` has it.
    """

    def __init__(self, model: EntropyModel, rows: int, *, exact: bool, reset_at_newline: bool):
        self.model, self.exact, self.reset_at_newline = model, exact, reset_at_newline
        shape, device = model.config.transformer, model.lm_head.weight.device
        self.stack: LocalStack | ExactStack | NoLayers
        if not model.layers:
            self.stack = NoLayers()
        elif exact and shape.window is not None:
            self.stack = ExactStack(model.layers, shape, rows, device)
        else:
            self.stack = LocalStack(model.layers, shape, rows, device)
        self.history = History(rows, max((1, *model.config.ngram_sizes)), device)

    def prefill(self, rows: list[int], tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """New sequences in `rows`: tokens [R, N], padded on the right -> entropies, float32 [R, N]."""
        entropies = None
        if self.reset_at_newline:
            entropies = entropies_of(self.model, tokens, reset_at_newline=True)
            # Only the latest line is remembered.
            lines = [_latest_line(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
            tokens, lengths = pad_sequence(lines, batch_first=True), [len(line) for line in lines]
        for i, row in enumerate(rows):
            self.history.fill(row, tokens[i, : lengths[i]])
        if max(lengths) == 0:
            self.forget(rows)
        else:
            x = self.stack.prefill(rows, self.model.embed(tokens), lengths)
            entropies = self._entropies(x) if entropies is None else entropies
        assert entropies is not None
        return entropies

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One more token of every row: [B] -> entropies, float32 [B]."""
        x = self.stack.step(self.model.embed(self.history.add(tokens))[:, -1:])
        if self.exact:
            return self._entropies(x)[:, 0]
        return linear_entropy(rms_norm(self.model.norm, x[:, 0]), self.model.lm_head.weight)

    def after(self, tokens: NDArray[np.int64]) -> None:
        """The host knows the latest tokens [B] now: rows whose line has ended forget it."""
        if self.reset_at_newline and (ended := np.flatnonzero(tokens == NEWLINE).tolist()):
            self.forget(ended)

    def forget(self, rows: list[int]) -> None:
        """The next token of `rows` begins a sequence."""
        self.history.tokens[rows] = 0
        self.stack.forget(rows)

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.stack.keep(rows)
        self.history.keep(rows)

    def _entropies(self, x: torch.Tensor) -> torch.Tensor:
        return linear_entropy(self.model.norm(x), self.model.lm_head.weight)


def _latest_line(tokens: torch.Tensor) -> torch.Tensor:
    """What comes after the last newline of tokens [n], nothing perhaps."""
    newlines = (tokens == NEWLINE).nonzero()
    return tokens[int(newlines[-1]) + 1 :] if len(newlines) else tokens


class NoLayers:
    """The stack of an entropy model whose knowledge is in its tables alone."""

    def prefill(self, rows: list[int], x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        return x

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forget(self, rows: list[int]) -> None:
        pass

    def keep(self, rows: list[int]) -> None:
        pass


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
        queries, keys, values = (x.transpose(1, 2) for x in (queries, self.keys, self.values))
        if keys.shape[1] != queries.shape[1]:  # as the full pass has them
            keys, values = (x.repeat_interleave(queries.shape[1] // x.shape[1], dim=1) for x in (keys, values))
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask).transpose(1, 2)[rows, place]
        return F.pad(y[:, None], (0, 0, 0, 0, 0, 0, 0, len(q) - count))


class ExactStack:
    """Windowed layers whose states have the bits of a full pass over the whole row, if that is longer than the window.

    Two things make bits differ: the number of rows of a matrix product, which is padded here to a multiple of 8, and
    the order in which attention sums, which is kept here by attending in the blocks of the full pass.
    """

    def __init__(self, layers: nn.ModuleList, config: TransformerConfig, rows: int, device: torch.device):
        assert config.window is not None
        self.layers, self.config, self.window = layers, config, config.window
        self.block = -(-config.window // 2)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = [0] * rows
        self.rotations = Rotations(config, device)
        self.caches: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer [B, 3 * block, H, E]

    def prefill(self, rows: list[int], x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """New sequences in `rows`: x [R, N, dim], padded on the right to N, of which `lengths` [R] are real."""
        block, length = self.block, x.shape[1]
        # Longer than the window, so that attention is windowed, and whole blocks of a multiple of 8 rows.
        unit = block * _ROWS
        padded = -(-max(length, self.window + 1) // unit) * unit
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

    def forget(self, rows: list[int]) -> None:
        """The next positions of `rows` begin sequences."""
        for row in rows:
            self.lengths[row] = self.positions[row] = 0

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
        near = (distance >= 0) & (distance < self.window)
        begin = self.positions // block * block - 2 * block
        return (near & (keys + begin[:, None, None] >= 0))[:, None]
