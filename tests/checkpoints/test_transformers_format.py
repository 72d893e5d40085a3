"""Models that transformers made and models that it reads: the same logits, gradients and patches as ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_lengths

from blt_kernels import PatchLayout
from blt_kernels.checkpoints import save_pretrained
from blt_kernels.checkpoints.transformers_format import DEFAULTS, ROPE_THETA, STACK_DEFAULTS, tensor_names
from blt_kernels.model import BLT
from blt_kernels.training.patcher import Patcher, PatcherConfig

transformers = pytest.importorskip("transformers")

from published_models import ENTROPY, SHAPES, THRESHOLD, make_ours, make_theirs, make_tokens  # noqa: E402


def assert_same(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal to 1e-4 of the scale of `expected`."""
    limit = 1e-4 * expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    assert error <= limit, f"{name}: differs by {error:.3g}, limit {limit:.3g}"


def assert_same_model(ours: BLT, theirs) -> None:
    """The same logits and gradients on the same text in the same patches."""
    tokens = make_tokens(61, 2)
    lengths = torch.nn.functional.pad(random_lengths(60, 4.5, 2), (1, 0), value=1)  # they need the first token alone
    expected = theirs(tokens, patch_lengths=lengths).logits
    actual = ours(tokens, PatchLayout.from_lengths(lengths, 61))
    assert_same(actual, expected, "logits")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    ours.zero_grad()
    theirs.zero_grad()
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        (theirs_name,) = tensor_names(name, ours.config)
        assert_same(parameter.grad.to_dense(), gradients[theirs_name], name)


def assert_same_patches(patcher: Patcher, theirs) -> None:
    tokens = make_tokens(200)
    entropies, lengths, _ = theirs.model.patcher(tokens, patch_size=4, threshold=patcher.config.threshold)
    assert_same(patcher.entropy_model.entropies(tokens), entropies, "entropies")
    cut, _ = patcher.cut(tokens[0].numpy())
    expected = lengths[0][lengths[0] > 0]
    assert 10 < len(expected) < 190
    assert cut.tolist() == expected.tolist()


@pytest.mark.parametrize(("shape", "max_shard_size"), [*((shape, "1GB") for shape in SHAPES), ("7B", "60KB")])
def test_theirs_becomes_ours(shape: str, max_shard_size: str, tmp_path: Path) -> None:
    theirs = make_theirs(SHAPES[shape])
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    ours, patcher = BLT.from_pretrained(tmp_path)
    assert ours.config == SHAPES[shape] and not ours.training
    assert patcher.config == PatcherConfig(threshold=THRESHOLD) and patcher.entropy_model.config == ENTROPY
    assert_same_model(ours, theirs)
    assert_same_patches(patcher, theirs)


@pytest.mark.parametrize(("shape", "max_shard_bytes"), [*((shape, 10**9) for shape in SHAPES), ("7B", 60_000)])
def test_ours_becomes_theirs(shape: str, max_shard_bytes: int, tmp_path: Path) -> None:
    ours, patcher = make_ours(SHAPES[shape], PatcherConfig(threshold=THRESHOLD))
    save_pretrained(tmp_path, ours, patcher, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_bytes == 10**9)
    theirs, report = transformers.BltForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    theirs.config.use_cache = False
    assert_same_model(ours, theirs)
    assert_same_patches(patcher, theirs)
