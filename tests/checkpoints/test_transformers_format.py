"""Models that transformers made and models that it reads: the same logits, gradients and patches as ours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_lengths

from blt_kernels import PatchLayout
from blt_kernels.checkpoints import save_pretrained
from blt_kernels.checkpoints.fields import Fields
from blt_kernels.checkpoints.transformers_format import (
    DEFAULTS,
    NGRAM_SIZES,
    ROPE_THETA,
    STACK_DEFAULTS,
    describe,
    tensor_names,
)
from blt_kernels.model import BLT, BLTConfig, EntropyModelConfig
from blt_kernels.training.checkpoint import CheckpointError
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


@pytest.mark.parametrize("top", [{}, {"max_patch_length": 5}, {"patching_mode": "byte"}, {"patching_mode": "space"}])
def test_they_cut_and_compute_alike(top: dict[str, Any], tmp_path: Path) -> None:
    """Without patch lengths, from tokens to logits. Modes that they do not know are single bytes for them."""
    theirs = make_theirs(SHAPES["1B"], **top)
    theirs.save_pretrained(tmp_path)
    ours, patcher = BLT.from_pretrained(tmp_path)
    assert (patcher.config.method == "fixed") == ("patching_mode" in top)
    assert patcher.config.max_patch_length == top.get("max_patch_length")
    tokens = make_tokens(61)
    expected, actual = theirs(tokens).logits, ours(tokens, patcher.layout(tokens).trim())
    # A longest patch that ends with the text is open for them, since they do not count the token that follows.
    assert_same(actual[:, :-1], expected[:, :-1], "logits")


def test_a_model_without_a_patcher(tmp_path: Path) -> None:
    make_theirs(SHAPES["1B"], None).save_pretrained(tmp_path / "theirs")
    ours, patcher = BLT.from_pretrained(tmp_path / "theirs")
    assert patcher is None
    save_pretrained(tmp_path / "ours", ours, None)
    theirs = transformers.BltForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.model.patcher is None
    assert BLT.from_pretrained(tmp_path / "ours")[1] is None


def test_single_bytes_go_out_and_come_in(tmp_path: Path) -> None:
    config = PatcherConfig(method="fixed", patch_size=1)
    save_pretrained(tmp_path, *make_ours(SHAPES["1B"], config))
    assert BLT.from_pretrained(tmp_path)[1].config == config
    tokens = make_tokens(40)
    theirs = transformers.BltForCausalLM.from_pretrained(tmp_path)
    single = theirs(tokens, patch_lengths=torch.ones(1, 41, dtype=torch.int64), use_cache=False).logits
    torch.testing.assert_close(theirs(tokens, use_cache=False).logits, single)


def test_absent_keys_mean_what_they_mean_to_transformers() -> None:
    theirs = transformers.BltConfig()
    assert theirs.encoder_hash_byte_group_size == list(NGRAM_SIZES)
    for section, defaults in DEFAULTS.items():
        part = getattr(theirs, section) if section else theirs
        for name, value in (defaults | (STACK_DEFAULTS if section else {})).items():
            if value is not None:
                assert getattr(part, name) == value, (section, name)
        if section:
            assert part.num_key_value_heads == part.num_attention_heads
            assert part.rope_parameters["rope_theta"] == ROPE_THETA.get(section, 500000.0)
            assert getattr(part, "head_dim", None) in (None, part.hidden_size // part.num_attention_heads)
    assert theirs.max_patch_length is None
    assert theirs.encoder_config.intermediate_size == int(8 * 1024 / 3)
    described = describe(Fields(Path("config.json"), {"model_type": "blt"}))
    assert described.model.encoder.ffn_dim == theirs.encoder_config.intermediate_size
    assert described.model.encoder.window == described.model.decoder.window == 512
    published = {"intermediate_size": 2816}
    described = describe(Fields(Path("config.json"), {"model_type": "blt", "encoder_config": published}))
    assert described.model == BLTConfig.preset("1B")
    assert described.entropy_model == EntropyModelConfig.preset("100M")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected False or None"),
        ({"decoder_config": {"cross_attn_all_layers": False}}, "decoder_config.cross_attn_all_layers: expected True"),
        (
            {"encoder_config": {"cross_attn_all_layers": True, "num_hidden_layers": 2}},
            "encoder_config.cross_attn_all_layers: expected False",
        ),
        ({"encoder_config": {"hidden_act": "gelu"}}, "encoder_config.hidden_act: expected 'silu'.*got 'gelu'"),
        ({"cross_attn_k": 4}, "encoder_config.cross_attn_k: expected 4.*got 2"),
        ({"decoder_config": {"cross_attn_k": 3}}, "decoder_config.cross_attn_k: expected 2.*got 3"),
        ({"decoder_config": {"hidden_size": 512}}, "decoder_config.hidden_size: expected 1024.*got 512"),
        ({"global_config": {"hidden_size": 512}}, "decoder_config.hidden_size_global: expected 512.*got 2048"),
        ({"vocab_size": 300}, "encoder_config.vocab_size: expected 300.*got 260"),
        (
            {"global_config": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8}}},
            "global_config.rope_parameters.rope_type: expected 'default' or 'llama3'.*got 'yarn'",
        ),
        (
            {"global_config": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8}}},
            "global_config.rope_parameters.low_freq_factor: missing",
        ),
        (
            {"patcher_config": {"rope_scaling": {"type": "linear", "factor": 2}}},
            "patcher_config.rope_scaling.type: expected 'default'",
        ),
        ({"global_config": {"head_dim": 64}}, "global_config.head_dim: expected None or 128.*got 64"),
        ({"encoder_hash_byte_group_nb_functions": 12}, "hash_functions: expected 1 .. 11, got 12"),
        ({"encoder_config": [1]}, r"encoder_config: expected a JSON object, got \[1\]"),
        ({"global_config": {"num_hidden_layers": "many"}}, "cannot be used .*num_layers: expected an int, got str"),
        ({"patching_threshold": None}, "PatcherConfig: threshold: expected a number"),
        ({"model_type": "llama"}, "model_type: expected 'blt', got 'llama'; `blt-kernels byteify`"),
        ({"model_type": None}, "model_type: expected 'blt', got None"),
    ],
)
def test_what_our_model_cannot_be_is_refused_by_name(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blt"} | values))
    with pytest.raises(CheckpointError, match=r"config.json: .*" + words):
        BLT.from_pretrained(tmp_path)


def test_one_layer_has_cross_attention_in_all_layers() -> None:
    sections = {"encoder_config": {"cross_attn_all_layers": True}}
    sections["decoder_config"] = {"cross_attn_all_layers": False, "num_hidden_layers": 1}
    assert describe(Fields(Path("config.json"), sections)).model.decoder.num_layers == 1


def test_files_of_older_versions_say_rope_theta_beside_its_scaling() -> None:
    sections = {"global_config": {"rope_theta": 7.0, "rope_scaling": {"rope_type": "default"}}}
    assert describe(Fields(Path("config.json"), sections)).model.latent.rope_theta == 7.0


def test_tables_of_another_width_are_written_in_the_width_of_the_model(tmp_path: Path) -> None:
    ours, _ = make_ours(SHAPES["1B"], hash_dim=8, sparse_grad=False)
    save_pretrained(tmp_path, ours, None)
    folded, _ = BLT.from_pretrained(tmp_path)
    assert folded.config.hash_dim is None and folded.hash_projection is None
    tokens = make_tokens(50)
    layout = PatchLayout.from_lengths(torch.tensor([[1, 9, 20, 20]]))
    assert_same(folded(tokens, layout), ours(tokens, layout), "logits")
    theirs = transformers.BltForCausalLM.from_pretrained(tmp_path)
    theirs_logits = theirs(tokens, patch_lengths=layout.lengths(), use_cache=False).logits
    assert_same(theirs_logits, ours(tokens, layout), "logits of theirs")


@pytest.mark.parametrize(
    ("patcher", "fields", "words"),
    [
        (PatcherConfig(threshold=1.0, rule="monotonic"), {}, "patcher.rule = 'monotonic', got 'transformers'"),
        (
            PatcherConfig(threshold=1.0, rule="combined", delta=0.1),
            {},
            "patcher.rule = 'combined', patcher.delta = 0.1",
        ),
        (PatcherConfig(method="spaces"), {}, "patcher.method = 'spaces'"),
        (PatcherConfig(method="fixed", patch_size=4), {}, "patcher.patch_size = 4"),
        (None, {"ngram_sizes": ()}, r"model.ngram_sizes = \(\)"),
        (None, {"decoder": dataclasses.replace(SHAPES["1B"].decoder, window=3)}, "model.decoder.window = 3"),
        (None, {"decoder": dataclasses.replace(SHAPES["1B"].decoder, ffn_dim=8)}, None),
    ],
)
def test_what_they_cannot_express_is_refused_by_name(
    patcher: PatcherConfig | None, fields: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    model = make_ours(SHAPES["1B"], patcher, **fields)
    if words is None:
        save_pretrained(tmp_path / "out", *model)
        return
    with pytest.raises(ValueError, match=r"save_pretrained: format: expected one that can express .*" + words):
        save_pretrained(tmp_path / "out", *model)
    assert not list(tmp_path.iterdir())
