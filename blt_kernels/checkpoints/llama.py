"""Byte-ifying: a BLT whose latent transformer starts from the layers of a token model of Llama's kind."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from ..model import BLT, BLTConfig, TransformerConfig
from ..training.checkpoint import reading
from ..training.runs import seeded
from .fields import Fields, read_json
from .source import safetensors_of
from .tensors import check_names, common_dtype, load_tensors
from .transformers_format import ACTIVATION, rotary

_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": ACTIVATION,
    "attention_bias": False,
    "mlp_bias": False,
}
_LATENT, _LAYERS = "global_transformer.layers.", "model.layers."
# What a token model has beside its layers: its vocabulary, its last norm, and tables of angles in old files.
_LEFT = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def byteify(path: str | os.PathLike[str], config: BLTConfig, seed: int = 0) -> BLT:
    """A BLT with the layers of the Llama in `path` as its latent transformer; everything else is untrained.

    The norm after Llama's last layer is left out, because the latent transformer has none.

    Args:
        path: a directory of transformers' Llama: `config.json` and safetensors.
        config: the shapes of the rest; the shape of the latent transformer becomes Llama's.
        seed: of the untrained weights.

    Returns:
        The model in eval mode on the CPU, in the dtype of the file.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is not like a latent transformer; names the field.
    """
    path = Path(path)
    file = path / "config.json"
    fields = Fields(file, read_json(file), _DEFAULTS)
    if fields.get("model_type") != "llama":
        raise fields.error("model_type", "'llama'", fields.get("model_type"))
    with reading(file):
        shape = _shape(fields)
    config = dataclasses.replace(config, latent=shape)
    with torch.device("meta"):
        model = BLT(config)
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items() if name.startswith(_LATENT)}
    theirs = {name: name.replace(_LATENT, _LAYERS) for name in wanted}
    found = {
        name: entry
        for name, entry in safetensors_of(path).items()
        if name not in _LEFT and not name.endswith("rotary_emb.inv_freq")
    }
    check_names(path, {theirs[name]: size for name, size in wanted.items()}, found)
    parts = {name: (found[theirs[name]],) for name in wanted}
    layers = load_tensors(parts, common_dtype(found.values()), torch.device("cpu"))
    for name, weight in layers.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            layers[name] = interleaved(weight, shape.head_dim)

    with seeded(seed):  # one layer in place of all, whose untrained weights nobody needs
        untrained = BLT(dataclasses.replace(config, latent=dataclasses.replace(shape, num_layers=1)))
    rest = {
        name: weight.to(next(iter(layers.values())).dtype)
        for name, weight in untrained.state_dict().items()
        if not name.startswith(_LATENT)
    }
    model.load_state_dict(rest | layers, assign=True)
    return model.eval()


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows of a projection [H * E, D] in the order of our rotary positions.

    Llama turns entry i of a head with entry i + E/2, we turn entry 2i with entry 2i + 1. Products of queries and keys
    are the same if both are in the same order.
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _shape(fields: Fields) -> TransformerConfig:
    dim, heads, kv_heads = fields["hidden_size"], fields["num_attention_heads"], fields["num_key_value_heads"]
    fields.expect("head_dim", None, dim // heads, why="heads share the width of the model")
    fields.expect("hidden_act", ACTIVATION, why="the model's feed-forward layers are SwiGLU")
    for name in ("attention_bias", "mlp_bias"):
        fields.expect(name, False, why="the model's layers have no bias")
    return TransformerConfig(
        dim,
        fields["num_hidden_layers"],
        heads,
        fields["intermediate_size"],
        norm_eps=fields["rms_norm_eps"],
        num_kv_heads=None if kv_heads in (None, heads) else kv_heads,
        **rotary(fields, 10000.0),
    )
