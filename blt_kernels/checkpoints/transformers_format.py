"""The directories of Hugging Face transformers' `BltForCausalLM`: `config.json` and safetensors.

Read in transformers 5.24 (`models/blt`); what absent keys mean is what its configuration classes make of them. Their
names of tensors are ours behind a prefix.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..model import BLTConfig, EntropyModelConfig, RopeScaling, TransformerConfig
from ..training.patcher import PatcherConfig
from .description import Description
from .fields import Fields

ACTIVATION = "silu"
SCALED = "llama3"
# Of rotary positions that are scaled, in the order of the fields of RopeScaling.
SCALING_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Absent keys, by section. Files that transformers up to 5.22 saved have no local_attention_window_len, and attention
# was full there; the released weights were trained with windows of 512, and that is how later versions read such files.
DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "vocab_size": 260,
        "tie_word_embeddings": False,
        "patch_in_forward": True,
        "patch_size": 4,
        "patching_mode": "entropy",
        "patching_threshold": 1.335442066192627,
        "max_patch_length": None,
        "local_attention_window_len": 512,
        "cross_attn_k": 2,
        "encoder_hash_byte_group_size": None,
        "encoder_hash_byte_group_vocab": 500002,
        "encoder_hash_byte_group_nb_functions": 1,
    },
    "encoder_config": {
        "vocab_size": 260,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_hidden_layers": 1,
        "intermediate_size": None,
        "cross_attn_all_layers": False,
        "cross_attn_k": 2,
    },
    "global_config": {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 25,
        "intermediate_size": 5632,
    },
    "decoder_config": {
        "hidden_size": 1024,
        "hidden_size_global": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 9,
        "intermediate_size": 2816,
        "cross_attn_all_layers": True,
        "cross_attn_k": 2,
    },
    "patcher_config": {
        "vocab_size": 260,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 14,
        "intermediate_size": 2048,
        "sliding_window": 512,
    },
}
STACK_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-5,
    "hidden_act": ACTIVATION,
}
NGRAM_SIZES = (3, 4, 5, 6, 7, 8)  # where encoder_hash_byte_group_size is absent or empty
ROPE_THETA = {"patcher_config": 10000.0}  # of other sections 500000


def tensor_names(ours: str, config: BLTConfig) -> tuple[str, ...]:
    """The tensors that make up `ours`; those of the entropy model are ours behind `patcher.`."""
    return (ours if ours == "lm_head.weight" else f"model.{ours}",)


def describe(root: Fields) -> Description:
    """The content of `config.json`.

    Raises:
        CheckpointError: names the field that our model cannot express.
    """
    top = root.with_defaults(DEFAULTS[""])
    parts = {name: top.section(name, STACK_DEFAULTS | DEFAULTS[name]) for name in DEFAULTS if name}
    encoder, latent, decoder = (parts[f"{part}_config"] for part in ("encoder", "global", "decoder"))
    top.expect("tie_word_embeddings", False, None, why="the model's head has weights of its own")
    if encoder["num_hidden_layers"] != 1:
        encoder.expect("cross_attn_all_layers", False, None, why="the model's encoder has one cross-attention")
    if decoder["num_hidden_layers"] != 1:
        decoder.expect("cross_attn_all_layers", True, why="every layer of the model's decoder has cross-attention")
    for section in (encoder, decoder):
        section.expect("cross_attn_k", top["cross_attn_k"], why="patches have the same slots everywhere")
    encoder.expect("vocab_size", top["vocab_size"], why="the model reads the vocabulary that it writes")
    decoder.expect("hidden_size", encoder["hidden_size"], why="the local models have the same width")
    decoder.expect("hidden_size_global", latent["hidden_size"], why="the decoder reads the latent transformer's output")

    window = top["local_attention_window_len"]
    model = BLTConfig(
        _stack(encoder, window, "encoder_config"),
        _stack(latent, None, "global_config"),
        _stack(decoder, window, "decoder_config"),
        slots_per_patch=top["cross_attn_k"],
        ngram_sizes=tuple(top["encoder_hash_byte_group_size"] or NGRAM_SIZES),
        hash_rows=top["encoder_hash_byte_group_vocab"],
        hash_functions=top["encoder_hash_byte_group_nb_functions"],
        vocab_size=top["vocab_size"],
    )
    if top["patching_mode"] != "entropy" or top["patch_size"] is None:
        # Whatever else the mode says, transformers makes every byte a patch, and says nothing about it.
        return Description(model, PatcherConfig(method="fixed", patch_size=1))
    if not top["patch_in_forward"]:
        return Description(model)
    patcher = parts["patcher_config"]
    shape = _stack(patcher, patcher["sliding_window"], "patcher_config")
    return Description(
        model,
        PatcherConfig(threshold=top["patching_threshold"], max_patch_length=top["max_patch_length"]),
        EntropyModelConfig(shape, patcher["vocab_size"]),
    )


def _stack(fields: Fields, window: int | None, name: str) -> TransformerConfig:
    dim, heads, kv_heads = fields["hidden_size"], fields["num_attention_heads"], fields["num_key_value_heads"]
    fields.expect("head_dim", None, dim // heads, why="heads share the width of the model")
    fields.expect("hidden_act", ACTIVATION, why="the model's feed-forward layers are SwiGLU")
    return TransformerConfig(
        dim,
        fields["num_hidden_layers"],
        heads,
        fields["intermediate_size"] or int(8 * dim / 3),
        window=window,
        norm_eps=fields["rms_norm_eps"],
        num_kv_heads=None if kv_heads in (None, 0, heads) else kv_heads,
        **rotary(fields, ROPE_THETA.get(name, 500000.0)),
    )


def rotary(fields: Fields, default_theta: float) -> dict[str, Any]:
    """Rotary positions, as arguments of TransformerConfig. transformers before 5 wrote the base beside `rope_scaling`,
    later versions within `rope_parameters`."""
    key = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    rope = fields.section(key, {"rope_type": None, "type": "default", "partial_rotary_factor": 1})
    kind = "rope_type" if rope.has("rope_type") else "type"
    rope.expect(kind, "default", SCALED, why="the model's rotary positions are scaled as Llama 3.1 does or not at all")
    rope.expect("partial_rotary_factor", 1, None, why="the model turns whole heads")
    theta = next((place.get("rope_theta") for place in (rope, fields) if place.has("rope_theta")), default_theta)
    scaling = None
    if rope[kind] == SCALED:
        scaling = RopeScaling(*(rope[name] for name in SCALING_FIELDS))
    return {"rope_theta": theta, "rope_scaling": scaling}


def config_of(description: Description, dtype: str) -> dict[str, Any]:
    """The content of `config.json` that says of `description` what it can; see `check_expressible`."""
    model, patcher, entropy_model = description.model, description.patcher, description.entropy_model
    local = {"cross_attn_k": model.slots_per_patch, "vocab_size": model.vocab_size}
    values: dict[str, Any] = {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": False,
        "cross_attn_k": model.slots_per_patch,
        "local_attention_window_len": model.encoder.window,
        "encoder_hash_byte_group_size": list(model.ngram_sizes),
        "encoder_hash_byte_group_vocab": model.hash_rows,
        "encoder_hash_byte_group_nb_functions": model.hash_functions,
        "encoder_config": _section(model.encoder)
        | local
        | {"cross_attn_all_layers": False, "hidden_size_global": model.latent.dim},
        "global_config": _section(model.latent),
        "decoder_config": _section(model.decoder)
        | local
        | {"cross_attn_all_layers": True, "hidden_size_global": model.latent.dim},
        "patch_in_forward": entropy_model is not None,
        "patching_mode": "entropy" if patcher is None or entropy_model is not None else "byte",
    }
    if patcher is not None and entropy_model is not None:
        values["patching_threshold"] = patcher.threshold
        values["max_patch_length"] = patcher.max_patch_length
        values["patcher_config"] = _section(entropy_model.transformer) | {
            "vocab_size": entropy_model.vocab_size,
            "sliding_window": entropy_model.transformer.window,
        }
    return values


def _section(config: TransformerConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": SCALED} | dict(zip(SCALING_FIELDS, dataclasses.astuple(config.rope_scaling), strict=True))
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "intermediate_size": config.ffn_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION,
        "rope_parameters": rope,
    }
