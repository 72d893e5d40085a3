"""Which token comes next: greedy, or drawn from a distribution that options reshape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from .._checks import check_int, check_number, fail_type, fail_value
from ..data import encode
from ..tokens import BOE_ID
from .reference import mask_tokens


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen. Each step changes what the one before it leaves, in this order.

    Attributes:
        repetition_penalty: above 0. Logits of tokens that the row has seen, prompt included, are divided by it where
            they are positive and multiplied by it elsewhere (CTRL, arXiv 1909.05858). With bytes this soon forbids the
            space; use it with care.
        temperature: divides the logits; 0 takes the likeliest token, and then nothing below has an effect.
        top_k: only so many of the likeliest tokens remain.
        top_p: only the likeliest tokens remain that together have at least this probability (arXiv 1904.09751).
        min_p: only tokens remain with at least this share of the likeliest one's probability (arXiv 2407.01082).
    """

    temperature: float = 0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        op = "generate"
        check_number(op, "temperature", self.temperature, 0)
        if self.top_k is not None:
            check_int(op, "top_k", self.top_k, 1)
        if self.top_p is not None:
            check_number(op, "top_p", self.top_p, 0, 1, above=True)
        if self.min_p is not None:
            check_number(op, "min_p", self.min_p, 0, 1)
        if self.repetition_penalty is not None:
            check_number(op, "repetition_penalty", self.repetition_penalty, 0, above=True)


class Sampler:
    """Chooses the next token of each row, from its logits and its own random numbers alone.

    A row draws one number a token, so that what it draws depends neither on other rows nor on when it is their turn.

    Args:
        vocab_size: V.
        rows: B, the rows that choose together.
    """

    def __init__(self, config: SamplingConfig, vocab_size: int, rows: int, device: torch.device):
        self.config = config
        self._generators = [np.random.default_rng(0)] * rows
        self._mask = mask_tokens(torch.zeros(vocab_size, dtype=torch.float64, device=device))
        self._seen = torch.zeros((rows, vocab_size), dtype=torch.bool, device=device)

    def begin(self, row: int, prompt: bytes, generator: np.random.Generator) -> None:
        """From now on `row` continues this prompt and draws from this generator."""
        self._generators[row] = generator
        self._seen[row] = False
        self._seen[row, torch.from_numpy(encode(prompt, eos=False)).to(self._seen.device)] = True

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these."""
        self._generators = [self._generators[row] for row in rows]
        self._seen = self._seen[list(rows)]

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row, int64 [B], by logits [B, V]. It does not wait for the device.

        A row whose logits are NaN gets the token BOE, which is never chosen otherwise.
        """
        config = self.config
        logits = logits + self._mask  # in float64, where no temperature and no penalty makes them infinite
        if config.repetition_penalty is not None:
            penalty = config.repetition_penalty
            logits = torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        largest, tokens = logits.max(-1)
        if config.temperature != 0:
            tokens = self._draw((logits - largest[:, None]) / config.temperature)
        tokens = torch.where(largest.isnan(), BOE_ID, tokens)
        if config.repetition_penalty is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        numbers = torch.tensor([generator.random() for generator in self._generators], dtype=torch.float64)
        chances, tokens = distribution(logits, self.config)
        sums = chances.double().cumsum(-1)
        # The total is a little off 1, and a number above it must still find a token that can be drawn.
        threshold = numbers.to(logits.device)[:, None] * sums[:, -1:]
        place = torch.searchsorted(sums, threshold, right=True)
        last = ((chances > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # NaN has no chances
        return tokens.gather(-1, torch.minimum(place, last))[:, 0]


def distribution(logits: torch.Tensor, config: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """What remains of softmax(logits [B, V]) after top-k, top-p and min-p.

    Returns:
        chances: [B, V], falling; not divided by their sum. Ties keep the order of the vocabulary.
        tokens: int64 [B, V], whose they are.
    """
    logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    if config.top_k is not None:
        logits[:, config.top_k :] = -torch.inf
    chances = logits.softmax(-1)
    if config.top_p is not None:
        before = chances.double().cumsum(-1) - chances  # the probability of all that are likelier
        chances = torch.where(before < config.top_p, chances, 0)
    if config.min_p is not None:
        chances = torch.where(chances >= config.min_p * chances[:, :1], chances, 0)
    return chances, tokens


def generators(seed: int | Sequence[int] | None, rows: int) -> list[np.random.Generator]:
    """One random generator for each row; see `generate` for what seeds mean."""
    if seed is None:
        return [np.random.default_rng() for _ in range(rows)]
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != rows:
            raise fail_value("generate", "seed", f"one number, or one for each of {rows} prompts", f"{len(seed)}")
        for number in seed:
            check_int("generate", "seed", number, 0)
        return [np.random.default_rng(number) for number in seed]
    check_int("generate", "seed", seed, 0)
    return [np.random.default_rng((seed, row) if row else seed) for row in range(rows)]


def check_stop(stop: Sequence[bytes]) -> tuple[bytes, ...]:
    """The byte strings that end a row, as a tuple; none of them is empty."""
    if isinstance(stop, (bytes, str)) or not isinstance(stop, Sequence):
        raise fail_type("generate", "stop", "a sequence of bytes objects", type(stop).__name__)
    for string in stop:
        if not isinstance(string, bytes):
            raise fail_type("generate", "stop", "bytes objects", type(string).__name__)
        if not string:
            raise fail_value("generate", "stop", "strings of at least one byte", "an empty one")
    return tuple(stop)
