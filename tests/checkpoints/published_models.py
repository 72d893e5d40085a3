"""Models of transformers with random weights, in shapes that are small and have what the released ones have."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; nothing here is looked for elsewhere

from transformers import BltConfig, BltForCausalLM

from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, RopeScaling, TransformerConfig
from blt_kernels.training.patcher import Patcher, PatcherConfig

THRESHOLD = 5.07  # amid the entropies of untrained models of these shapes
LOCAL = TransformerConfig(32, 1, 4, 88, window=16)
LATENT = TransformerConfig(64, 3, 4, 176)
ENTROPY = EntropyModelConfig(TransformerConfig(32, 2, 2, 96, window=16, rope_theta=10000.0))

SHAPES = {
    # One encoder layer, K*d = D.
    "1B": BLTConfig(LOCAL, LATENT, dataclasses.replace(LOCAL, num_layers=3), hash_rows=53),
    # A projection into the latent width, since K*d = 96 and D = 64.
    "7B": BLTConfig(
        dataclasses.replace(LOCAL, dim=24, num_heads=3),
        LATENT,
        dataclasses.replace(LOCAL, dim=24, num_heads=3, num_layers=2),
        slots_per_patch=4,
        hash_rows=53,
    ),
    # One slot, full attention, several hash functions, another vocabulary and other bases of rotary positions.
    "one slot": BLTConfig(
        dataclasses.replace(LOCAL, num_layers=2, window=None, rope_theta=1000.0),
        dataclasses.replace(LATENT, rope_theta=2000.0, norm_eps=1e-3),
        dataclasses.replace(LOCAL, window=None),
        slots_per_patch=1,
        ngram_sizes=(2, 5),
        hash_rows=31,
        hash_functions=3,
        vocab_size=270,
    ),
    # Grouped heads everywhere, windows that do not divide the text, scaled rotary positions.
    "grouped heads": BLTConfig(
        dataclasses.replace(LOCAL, num_kv_heads=2, window=7),
        dataclasses.replace(LATENT, num_heads=8, num_kv_heads=2, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32)),
        dataclasses.replace(LOCAL, num_layers=2, num_kv_heads=1, window=7),
        slots_per_patch=3,
        ngram_sizes=(3, 4),
        hash_rows=31,
        hash_functions=2,
    ),
}


def make_theirs(config: BLTConfig, entropy: EntropyModelConfig | None = ENTROPY, **top: Any) -> BltForCausalLM:
    """Their model of this shape; `top` are fields of its configuration."""
    local = {"cross_attn_k": config.slots_per_patch, "hidden_size_global": config.latent.dim}
    local["vocab_size"] = config.vocab_size
    patcher = {}
    if entropy is not None:
        patcher = _section(entropy.transformer) | {"sliding_window": entropy.transformer.window}
    values = {
        "vocab_size": config.vocab_size,
        "cross_attn_k": config.slots_per_patch,
        "local_attention_window_len": config.encoder.window,
        "encoder_hash_byte_group_size": list(config.ngram_sizes),
        "encoder_hash_byte_group_vocab": config.hash_rows,
        "encoder_hash_byte_group_nb_functions": config.hash_functions,
        "encoder_config": _section(config.encoder) | local,
        "global_config": _section(config.latent),
        "decoder_config": _section(config.decoder) | local,
        "patcher_config": patcher,
        "patch_in_forward": entropy is not None,
        "patching_threshold": THRESHOLD,
        "use_cache": False,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    model = BltForCausalLM(BltConfig(**(values | top))).eval()
    randomise(model)
    return model


def _section(config: TransformerConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor}
        rope |= {"high_freq_factor": scaling.high_freq_factor}
        rope |= {"original_max_position_embeddings": scaling.original_length}
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "intermediate_size": config.ffn_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
    }


def make_ours(config: BLTConfig, patcher: PatcherConfig | None = None, **fields: Any) -> tuple[BLT, Patcher | None]:
    """Our model of this shape, with the patcher of `patcher` around a random entropy model."""
    torch.manual_seed(0)
    model = BLT(dataclasses.replace(config, **fields)).eval()
    randomise(model)
    if patcher is None:
        return model, None
    entropy_model = EntropyModel(ENTROPY) if patcher.method == "entropy" else None
    if entropy_model is not None:
        randomise(entropy_model)
    return model, Patcher(patcher, entropy_model)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Norms and tables, which start at one value each, so that every parameter matters."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif "hash_tok_embedding" in name:
            parameter.normal_(std=0.2)


def make_tokens(num_bytes: int, batch: int = 1) -> torch.Tensor:
    tokens = torch.randint(4, 260, (batch, num_bytes), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 1
    return tokens
