"""A small BLT and its entropy model, trained for some seconds on Python's own source, for all tests of generation.

They are trained because a random model's logits and entropies are alike everywhere, which hides errors.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable

import pytest
import torch

from blt_kernels import calibrate_threshold
from blt_kernels.data import encode
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.training.patcher import Patcher, PatcherConfig

LOCAL = TransformerConfig(32, 2, 2, 64, window=24)
SHAPE = BLTConfig(
    LOCAL, TransformerConfig(48, 2, 2, 96), LOCAL, ngram_sizes=(2, 3, 4), hash_rows=1021, hash_dim=16, sparse_grad=False
)
NGRAMS = EntropyModelConfig(TransformerConfig(32, 0, 2, 64), ngram_sizes=(2, 4, 6), hash_rows=1021)
ENTROPY_SHAPE = EntropyModelConfig(TransformerConfig(32, 2, 2, 64, window=24, rope_theta=10000.0))
STEPS, ROWS, LENGTH = 40, 8, 256


def _train(model: BLT | EntropyModel, tokens: torch.Tensor, patcher: Patcher | None = None) -> None:
    """tokens: [n] of a long text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        begins = torch.randint(len(tokens) - LENGTH - 1, (ROWS, 1), generator=torch.Generator().manual_seed(step))
        rows = tokens[begins + torch.arange(LENGTH + 1)]
        rows[:, 0] = 1  # BOS
        given, targets = rows[:, :-1], rows[:, 1:]
        layout = () if patcher is None else (patcher.layout(given).trim(),)
        model.loss(given, targets, *layout).mean.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="session")
def text() -> bytes:
    """Real text that every machine has."""
    return inspect.getsource(typing).encode()


@pytest.fixture(scope="session")
def models(text: bytes) -> tuple[BLT, EntropyModel]:
    torch.manual_seed(0)
    tokens = torch.from_numpy(encode(text))
    entropy_model, blt = EntropyModel(ENTROPY_SHAPE), BLT(SHAPE)
    _train(entropy_model, tokens)
    _train(blt, tokens, _entropy_patcher(entropy_model, tokens))
    return blt, entropy_model


def _entropy_patcher(model: EntropyModel, tokens: torch.Tensor, **options: typing.Any) -> Patcher:
    """A patcher whose patches have 4 bytes on average."""
    threshold = calibrate_threshold(model.entropies(tokens[None, :4096]), 4.0, **options)
    return Patcher(PatcherConfig(threshold=threshold, **options), model)


@pytest.fixture(scope="session")
def blt(models: tuple[BLT, EntropyModel]) -> BLT:
    return models[0]


@pytest.fixture(scope="session")
def patchers(models: tuple[BLT, EntropyModel], text: bytes) -> dict[str, Patcher]:
    """One of each rule, with and without a longest patch."""
    model, tokens = models[1], torch.from_numpy(encode(text))

    def by_entropy(**options: typing.Any) -> Patcher:
        return _entropy_patcher(model, tokens, **options)

    torch.manual_seed(0)
    ngrams = EntropyModel(NGRAMS)
    torch.nn.init.normal_(ngrams.hash_tok_embedding.weight)  # type: ignore[union-attr]
    makers: dict[str, Callable[[], Patcher]] = {
        "threshold": by_entropy,
        "threshold, at most 5": lambda: by_entropy(max_patch_length=5),
        "monotonic": lambda: by_entropy(rule="monotonic"),
        "combined": lambda: by_entropy(rule="combined", delta=-1.0),
        "spaces": lambda: Patcher(PatcherConfig("spaces")),
        "spaces, at most 3": lambda: Patcher(PatcherConfig("spaces", max_patch_length=3)),
        "fixed": lambda: Patcher(PatcherConfig("fixed", patch_size=5)),
        "threshold, reset at newlines": lambda: Patcher(
            PatcherConfig(threshold=by_entropy().config.threshold, reset_at_newline=True), model
        ),
        "threshold of a model of n-grams": lambda: _entropy_patcher(ngrams, tokens),
    }
    return {name: make() for name, make in makers.items()}


@pytest.fixture(scope="session")
def patcher(patchers: dict[str, Patcher]) -> Patcher:
    return patchers["threshold"]
