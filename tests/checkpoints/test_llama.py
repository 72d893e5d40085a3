"""Byte-ifying: our latent transformer computes what the layers of transformers' Llama compute."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from blt_kernels.checkpoints import from_pretrained, save_pretrained
from blt_kernels.checkpoints.llama import byteify
from blt_kernels.model import BLT, BLTConfig, TransformerConfig
from blt_kernels.model.transformer import plan_attention
from blt_kernels.training.checkpoint import CheckpointError

pytest.importorskip("transformers")

from published_models import randomise
from transformers import LlamaConfig, LlamaForCausalLM

LOCAL = TransformerConfig(32, 1, 4, 88, window=16)
REST = BLTConfig(LOCAL, TransformerConfig(8, 1, 1, 8), LOCAL, ngram_sizes=(3,), hash_rows=11)


def make_llama(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    shape = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6}
    shape |= {"num_key_value_heads": 2, "vocab_size": 50, "rms_norm_eps": 1e-4, "attn_implementation": "eager"}
    shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    model = LlamaForCausalLM(LlamaConfig(**(shape | fields))).eval()
    randomise(model)
    return model


# Some pairs of a head turn as before, some are interpolated, some are eight times as slow.
SCALED = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize("num_key_value_heads", [6, 2, 1])
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"rope_parameters": SCALED}])
def test_the_latent_transformer_is_llama_s_layers(
    num_key_value_heads: int, fields: dict[str, Any], tmp_path: Path
) -> None:
    llama = make_llama(num_key_value_heads=num_key_value_heads, **fields)
    llama.save_pretrained(tmp_path)
    latent = byteify(tmp_path, REST).global_transformer
    assert (latent.config.latent.rope_scaling is not None) == ("rope_parameters" in fields)
    assert latent.config.latent.num_kv_heads == (None if num_key_value_heads == 6 else num_key_value_heads)
    x = torch.randn(2, 40, 96)
    states = []
    llama.model.layers[-1].register_forward_hook(lambda module, args, output: states.append(output))
    llama.model(inputs_embeds=x)
    expected = states[0][0] if isinstance(states[0], tuple) else states[0]
    actual, plan = x, plan_attention(latent.config.latent, x, None)
    for layer in latent.layers:
        actual = layer(actual, plan)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_rest_is_untrained_and_follows_the_seed(tmp_path: Path) -> None:
    make_llama().to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    model, again, other = (byteify(tmp_path / "llama", REST, seed) for seed in (0, 0, 1))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training
    assert model.config == dataclasses.replace(REST, latent=model.config.latent)
    name = "local_encoder.embed_tokens.weight"
    torch.testing.assert_close(model.state_dict()[name], again.state_dict()[name], rtol=0, atol=0)
    assert not torch.equal(model.state_dict()[name], other.state_dict()[name])
    save_pretrained(tmp_path / "out", model, None)
    loaded, patcher = from_pretrained(tmp_path / "out")
    assert patcher is None and isinstance(loaded, BLT)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
            "rope_scaling.rope_type: expected 'default' or 'llama3'",
        ),
        ({"attention_bias": True}, "attention_bias: expected False"),
        ({"mlp_bias": True}, "mlp_bias: expected False"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu'"),
        ({"head_dim": 32}, "head_dim: expected None or 16.*got 32"),
        ({"model_type": "qwen3"}, "model_type: expected 'llama', got 'qwen3'"),
        ({"num_hidden_layers": 4}, r"missing: model\.layers\.3\.input_layernorm\.weight"),
        ({"num_hidden_layers": 2}, r"unexpected: model\.layers\.2\."),
        (
            {"intermediate_size": 161},
            r"of another shape: model\.layers\.0\.mlp\.gate_proj\.weight: expected \(161, 96\)",
        ),
    ],
)
def test_what_is_not_like_a_latent_transformer_is_refused_by_name(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    make_llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    if "rope_scaling" in fields:
        del config["rope_parameters"]
    file.write_text(json.dumps(config | fields))
    with pytest.raises(CheckpointError, match=words):
        byteify(tmp_path, REST)
