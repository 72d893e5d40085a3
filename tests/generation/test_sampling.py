"""Sampling: what remains of a distribution, that draws follow it, and that rows keep to themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from blt_kernels.generation.sampling import Sampler, SamplingConfig, distribution, generators

CPU = torch.device("cpu")
P = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])  # of tokens 0 .. 4; falling they are 1, 2, 3, 4, 0


def kept(**options: float) -> dict[int, float]:
    """What remains of P: {token: chance}, chances divided by their sum."""
    chances, tokens = distribution(P.log()[None], SamplingConfig(temperature=1, **options))  # type: ignore[arg-type]
    chances = chances[0] / chances.sum()
    return {int(token): round(float(c), 4) for token, c in zip(tokens[0], chances, strict=True) if c > 0}


def test_what_remains_of_a_distribution() -> None:
    everything = {1: 0.4, 2: 0.25, 3: 0.2, 4: 0.1, 0: 0.05}
    assert kept() == everything
    assert kept(top_k=2) == {1: 0.6154, 2: 0.3846}
    assert kept(top_k=99) == kept(top_p=1.0) == kept(min_p=0.0) == everything
    assert kept(top_p=0.39) == kept(top_p=1e-9) == kept(top_k=1) == kept(min_p=1.0) == {1: 1.0}
    assert kept(top_p=0.41) == {1: 0.6154, 2: 0.3846}, "the token that crosses the bound remains"
    assert kept(min_p=0.45) == {1: 0.4706, 2: 0.2941, 3: 0.2353}
    # In this order: of the two that top-k leaves, the first has 0.6154, which is enough for top-p.
    assert kept(top_k=2, top_p=0.6) == {1: 1.0}
    assert kept(top_p=0.9, min_p=0.55) == {1: 0.6154, 2: 0.3846}


def test_masked_tokens_and_infinite_logits() -> None:
    """Tokens without a byte are never chosen, whatever their logits, and -inf is no obstacle."""
    logits = torch.full((1, 10), -torch.inf)
    logits[0, [0, 1, 3]] = 50.0
    logits[0, 7] = -3.0
    for config in (SamplingConfig(), SamplingConfig(temperature=2.0, top_p=0.5, min_p=0.1, top_k=5)):
        assert Sampler(config, 10, 1, CPU).choose(logits).tolist() == [7]


def draws(config: SamplingConfig, logits: torch.Tensor, seeds: Sequence[int], count: int) -> torch.Tensor:
    """int64 [count, rows]"""
    sampler = Sampler(config, logits.shape[1], len(logits), CPU)
    for row, generator in enumerate(generators(seeds, len(logits))):
        sampler.begin(row, b"", generator)
    return torch.stack([sampler.choose(logits) for _ in range(count)])


def test_draws_follow_the_distribution() -> None:
    """Counts of 4,000 draws within 5 standard deviations, and the temperature squares or roots the chances."""
    logits = torch.full((1, 20), -torch.inf)
    logits[0, 10:15] = P.log()
    count = 4000
    for temperature in (0.5, 1.0, 2.0):
        expected = P ** (1 / temperature) / (P ** (1 / temperature)).sum()
        chosen = draws(SamplingConfig(temperature=temperature), logits, [3], count).flatten()
        counts = torch.bincount(chosen, minlength=20)
        assert counts.sum() == counts[10:15].sum() == count
        deviation = (count * expected * (1 - expected)).sqrt()
        assert ((counts[10:15] - count * expected).abs() <= 5 * deviation).all(), temperature
    chosen = draws(SamplingConfig(temperature=1.0, top_k=2), logits, [4], 500)
    assert set(chosen.flatten().tolist()) == {11, 12}


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(4, 30)
    logits[:, [0, 1, 3]] = -9.0
    cold = draws(SamplingConfig(temperature=1e-4), logits, [1, 2, 3, 4], 5)
    assert (cold == draws(SamplingConfig(), logits, [1, 2, 3, 4], 1)).all()


def test_extreme_temperatures_and_penalties_stay_finite() -> None:
    """They overflow float32, in which the logits come."""
    logits = torch.randn(4, 30)
    likeliest = draws(SamplingConfig(), logits, [1, 2, 3, 4], 1)
    assert (draws(SamplingConfig(temperature=1e-45), logits, [1, 2, 3, 4], 5) == likeliest).all()
    assert (draws(SamplingConfig(temperature=5e-324), logits, [1, 2, 3, 4], 5) == likeliest).all()
    hot = draws(SamplingConfig(temperature=1e300), logits, [1, 2, 3, 4], 200)
    assert set(hot.flatten().tolist()) == set(range(30)) - {0, 1, 3}, "all are alike, but those without a byte"
    for penalty in (1e-45, 1e300):
        chosen = draws(SamplingConfig(temperature=1.0, repetition_penalty=penalty), logits, [1, 2, 3, 4], 5)
        assert not torch.isin(chosen, torch.tensor([0, 1, 3])).any()


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(temperature=1.0, top_k=3)])
def test_nan_gives_the_token_that_is_never_chosen(config: SamplingConfig) -> None:
    logits = torch.randn(2, 30)
    logits[1, 9] = torch.nan
    chosen = draws(config, logits, [1, 2], 1)[0].tolist()
    assert chosen[0] not in (0, 1, 3) and chosen[1] == 0


def test_rows_draw_from_their_own_numbers() -> None:
    logits = torch.randn(3, 30)
    config = SamplingConfig(temperature=1.0)
    together = draws(config, logits, [7, 8, 9], 50)
    for row, seed in enumerate((7, 8, 9)):
        assert (draws(config, logits[row : row + 1], [seed], 50)[:, 0] == together[:, row]).all()
    assert (draws(config, logits[:1].repeat(2, 1), [5, 5], 50).diff(dim=1) == 0).all()
    assert (draws(config, logits[:1].repeat(2, 1), [5, 6], 50).diff(dim=1) != 0).any()


def test_seeds() -> None:
    first = [generator.random() for generator in generators(5, 3)]
    assert first == [generator.random() for generator in generators(5, 3)]
    assert len(set(first)) == 3
    assert first[0] == generators([5], 1)[0].random()
    assert generators(None, 1)[0].random() != generators(None, 1)[0].random()


def test_repetition_penalty() -> None:
    """Tokens of the prompt, and those that were chosen since, get smaller logits; others keep theirs."""
    logits = torch.full((1, 260), -4.0)
    logits[0, [4 + ord("a"), 4 + ord("b"), 4 + ord("c")]] = torch.tensor([3.0, 2.0, 1.0])
    sampler = Sampler(SamplingConfig(repetition_penalty=2.5), 260, 1, CPU)
    sampler.begin(0, b"a", np.random.default_rng())
    # a has 3 / 2.5; then b has 0.8, and a is the likeliest again.
    assert [chr(int(sampler.choose(logits)) - 4) for _ in range(2)] == ["b", "a"]
    sampler.begin(0, b"", np.random.default_rng())
    assert [chr(int(sampler.choose(logits)) - 4) for _ in range(2)] == ["a", "b"]
    negative = torch.full((1, 260), -2.0)
    negative[0, 4 + ord("a")] = -1.0
    sampler.begin(0, b"a", np.random.default_rng())
    assert int(sampler.choose(negative)) != 4 + ord("a"), "a negative logit becomes more negative"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: expected a finite number of at least 0"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"top_p": 0.0}, "top_p: expected a finite number above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a finite number above 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"generate: {message}"):
        SamplingConfig(**options)  # type: ignore[arg-type]
