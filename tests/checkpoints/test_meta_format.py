"""The directories of Meta's code: names by the published mapping, both forms of files, every rule."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blt_kernels.checkpoints import save_pretrained
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.training.checkpoint import CheckpointError
from blt_kernels.training.patcher import Patcher, PatcherConfig

LOCAL = TransformerConfig(24, 1, 3, 256, window=7)
CONFIG = BLTConfig(
    LOCAL,
    TransformerConfig(64, 2, 8, 256, num_kv_heads=2),
    dataclasses.replace(LOCAL, num_layers=2),
    slots_per_patch=4,
    ngram_sizes=(2, 3, 4, 5, 6, 7),
    hash_rows=11,
    hash_functions=2,  # 12 tables: the tenth does not follow the first
)
ENTROPY = EntropyModelConfig(TransformerConfig(16, 2, 2, 256, window=9, rope_theta=10000.0))
# The published conversion to transformers, as replacements in names.
PUBLISHED = {
    ".attention.": ".self_attn.",
    ".feed_forward.": ".mlp.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".tok_embeddings.": ".embed_tokens.",
    ".cross_attn_norm_q.": ".q_norm.",
    ".cross_attn_norm_kv.": ".k_norm.",
    ".w1.": ".gate_proj.",
    ".w2.": ".down_proj.",
    ".w3.": ".up_proj.",
    ".wq.": ".q_proj.",
    ".wk.": ".k_proj.",
    ".wv.": ".v_proj.",
    ".wo.": ".o_proj.",
    ".output.": ".lm_head.",
}


def make(patcher: PatcherConfig | None = None, config: BLTConfig = CONFIG) -> tuple[BLT, Patcher | None]:
    model = BLT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    if patcher is None:
        return model, None
    return model, Patcher(patcher, EntropyModel(ENTROPY) if patcher.method == "entropy" else None)


def by_published_mapping(named: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in named.items():
        name = prefix + name
        for theirs, ours in PUBLISHED.items():
            name = name.replace(theirs, ours)
        renamed[f"model.{name}"] = tensor
    return renamed


def test_names_are_those_of_the_published_mapping(tmp_path: Path) -> None:
    model, patcher = make(PatcherConfig(threshold=1.5))
    save_pretrained(tmp_path / "meta", model, patcher, format="meta")
    save_pretrained(tmp_path / "transformers", model, patcher)
    mapped = by_published_mapping(load_file(tmp_path / "meta" / "model.safetensors"))
    entropy = torch.load(tmp_path / "meta" / "entropy_model" / "consolidated.pth", weights_only=True)["model"]
    mapped |= by_published_mapping(entropy, "patcher.")
    mapped["lm_head.weight"] = mapped.pop("model.local_decoder.lm_head.weight")
    tables = [mapped.pop(f"model.encoder_hash_tok_embedding.{table}.weight") for table in range(12)]
    mapped["model.encoder_hash_tok_embedding.weight"] = torch.cat(tables)
    expected = load_file(tmp_path / "transformers" / "model.safetensors")
    assert mapped.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(mapped[name], tensor, rtol=0, atol=0)


def assert_same(path: Path, model: BLT, patcher: Patcher | None) -> None:
    loaded, cutter = BLT.from_pretrained(path)
    assert loaded.config == model.config and loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert (cutter is None) == (patcher is None)
    if patcher is not None and cutter is not None:
        assert cutter.state() == patcher.state()
        for name, tensor in patcher.weights().items():
            torch.testing.assert_close(cutter.weights()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    "patcher",
    [
        None,
        PatcherConfig(threshold=1.25, max_patch_length=9),
        PatcherConfig(threshold=0.5, rule="monotonic"),
        PatcherConfig(threshold=1.25, rule="combined", delta=0.25),
        PatcherConfig(method="spaces", max_patch_length=7),
    ],
)
@pytest.mark.parametrize("ngram_sizes", [(), (3, 4)])
def test_every_rule_goes_out_and_comes_in(
    patcher: PatcherConfig | None, ngram_sizes: tuple[int, ...], tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, ngram_sizes=ngram_sizes, hash_functions=1)
    model = make(patcher, config)
    save_pretrained(tmp_path, *model, format="meta")
    assert_same(tmp_path, *model)


def test_consolidated_files(tmp_path: Path) -> None:
    """`consolidated.pth` with `params.json` for the model, and the other form for the entropy model."""
    model, patcher = make(PatcherConfig(threshold=1.5))
    save_pretrained(tmp_path, model, patcher, format="meta")
    named = load_file(tmp_path / "model.safetensors")
    args = json.loads((tmp_path / "config.json").read_text())["args"]
    args |= {"encoder_hash_byte_group_size": "2,3,4,5,6,7", "patching_threshold": 9.0}
    rule = {"patcher_args": {"threshold": 1.5}}  # the rule that it was trained with
    (tmp_path / "params.json").write_text(json.dumps({"model": args, "data": rule, "steps": 3}))
    torch.save({"model": named | {"rope.freqs_cis": torch.zeros(3)}, "optim": {}}, tmp_path / "consolidated.pth")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).unlink()
    folder = tmp_path / "entropy_model"
    entropy_args = json.loads((folder / "params.json").read_text())["entropy_model"]
    (folder / "config.json").write_text(json.dumps({"args": entropy_args}))
    save_file(torch.load(folder / "consolidated.pth", weights_only=True)["model"], folder / "model.safetensors")
    for name in ("params.json", "consolidated.pth"):
        (folder / name).unlink()
    assert_same(tmp_path, model, patcher)
    shutil.rmtree(folder)
    assert_same(tmp_path, model, None)  # nothing cuts by entropy without an entropy model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cross_attn_all_layers_decoder": False}, "cross_attn_all_layers_decoder: expected True"),
        (
            {"cross_attn_all_layers_encoder": True, "n_layers_local_encoder": 2},
            "cross_attn_all_layers_encoder: expected F",
        ),
        ({"cross_attn_encoder": False}, "cross_attn_encoder: expected True"),
        ({"cross_attn_window_decoder": 2}, "cross_attn_window_decoder: expected None or 1.*got 2"),
        ({"cross_attn_nheads": 6}, "n_heads_local_encoder: expected 6.*got 3"),
        ({"n_kv_heads": 1}, "n_kv_heads: expected None or 3, because cross-attention has no grouped heads.*got 1"),
        ({"downsampling_by_pooling": "avg"}, "downsampling_by_pooling: expected 'max'.*got 'avg'"),
        ({"weight_tying": True}, "weight_tying: expected False"),
        ({"dim_local_decoder": 48}, "dim_local_decoder: expected 24.*got 48"),
        ({"non_linearity": "gelu"}, "non_linearity: expected 'swiglu'"),
        ({"patching_mode": "bpe"}, "patching_mode: expected 'entropy' or 'space'.*got 'bpe'"),
    ],
)
def test_what_our_model_cannot_be_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_pretrained(tmp_path, *make(), format="meta")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"args": json.loads(file.read_text())["args"] | change}))
    with pytest.raises(CheckpointError, match="config.json: args." + words):
        BLT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encoder": dataclasses.replace(LOCAL, num_kv_heads=1)}, "model.encoder.num_kv_heads = 1"),
        ({"latent": dataclasses.replace(CONFIG.latent, rope_theta=7.0)}, "model.latent.rope_theta = 7.0"),
        ({"latent": dataclasses.replace(CONFIG.latent, ffn_dim=100)}, "model.latent.ffn_dim = 100"),
        ({"decoder": dataclasses.replace(CONFIG.decoder, num_heads=6)}, "n_heads_local_decoder: expected 3.*got 6"),
    ],
)
def test_what_they_cannot_express_is_refused_by_name(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    model, _ = make(config=dataclasses.replace(CONFIG, **fields))
    with pytest.raises(ValueError, match="save_pretrained: format: expected one that can express .*" + words):
        save_pretrained(tmp_path / "out", model, None, format="meta")
    with pytest.raises(ValueError, match=r"patcher.method = 'fixed'|threshold"):
        save_pretrained(tmp_path / "out", *make(PatcherConfig(method="fixed", patch_size=3)), format="meta")
    assert not list(tmp_path.iterdir())
