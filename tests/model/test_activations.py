"""Activation checkpointing changes what is kept for backward, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blt_kernels.layout import PatchLayout
from blt_kernels.model import (
    BLT,
    BLTConfig,
    EntropyModel,
    EntropyModelConfig,
    TransformerConfig,
    checkpoint_activations,
)

LAYERS = 4
LOCAL = TransformerConfig(32, LAYERS, 2, 64, window=16)
BLT_CONFIG = BLTConfig(LOCAL, TransformerConfig(64, LAYERS, 2, 128), LOCAL, ngram_sizes=(3,), hash_rows=31)
NAMES = ["entropy", "blt"]


def make(name: str) -> EntropyModel | BLT:
    torch.manual_seed(0)
    return EntropyModel(EntropyModelConfig(LOCAL)) if name == "entropy" else BLT(BLT_CONFIG)


def loss_of(model: EntropyModel | BLT) -> torch.Tensor:
    """Of one packed row with a tail."""
    tokens = torch.randint(4, 260, (1, 128), generator=torch.Generator().manual_seed(1))
    targets, cu_seqlens = tokens.roll(-1, 1), torch.tensor([0, 50, 60, 120])
    sequences = {"cu_seqlens": cu_seqlens, "longest_sequence": 60}
    if isinstance(model, EntropyModel):
        return model.loss(tokens, targets, **sequences).mean
    layout = PatchLayout.from_starts(tokens % 3 == 0, cu_seqlens=cu_seqlens, capacity=64)
    return model.loss(tokens, targets, layout, **sequences, longest_patches=40).mean


def gradients(model: EntropyModel | BLT, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.to_dense() for parameter in model.parameters() if parameter.grad is not None]


def kept_bytes(model: EntropyModel | BLT) -> int:
    """Of the tensors that backward needs of a forward pass, each storage once, less the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(model)
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_stay_the_same(name: str, autocast: bool) -> None:
    model = make(name)
    results = []
    for enabled in (False, True):
        checkpoint_activations(model, enabled)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model)
        results.append([loss, *gradients(model, loss)])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_keeps_its_input_alone(name: str) -> None:
    """What is kept grows with the layers by little more than one input of each, where it was many times as much."""
    model = make(name)
    plain = kept_bytes(model)
    checkpoint_activations(model)
    checkpointed = kept_bytes(model)
    assert checkpointed < plain / 4
    checkpoint_activations(model, False)
    assert kept_bytes(model) == plain


@pytest.mark.parametrize("name", NAMES)
def test_under_compile(name: str) -> None:
    model = make(name)
    expected = gradients(model, loss_of(model))
    checkpoint_activations(model)
    model.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    for got, wanted in zip(gradients(model, loss_of(model)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_a_model_without_layers_of_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected a BLT or an EntropyModel, got Linear"):
        checkpoint_activations(nn.Linear(2, 2))
