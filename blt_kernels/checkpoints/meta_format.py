"""The directories of the published code of Meta: `consolidated.pth` and `params.json`, or `model.safetensors` and
`config.json`, and the entropy model likewise in a directory `entropy_model` beside them.

Its names, and what absent fields mean, are in `meta_fields`.
"""

from __future__ import annotations

from typing import Any

from ..model import BLTConfig, EntropyModelConfig, TransformerConfig
from ..training.patcher import PatcherConfig
from .description import Description
from .fields import Fields
from .meta_fields import ENTROPY_DEFAULTS, MODEL_DEFAULTS, PATCHER_DEFAULTS, PATCHER_FIELDS, WORDS


def tensor_names(ours: str, config: BLTConfig) -> tuple[str, ...]:
    """The tensors that make up `ours`, in order; those of the entropy model are ours behind `patcher.`."""
    if ours == "encoder_hash_tok_embedding.weight":
        tables = config.hash_functions * len(config.ngram_sizes)
        return tuple(f"encoder_hash_tok_embedding.{table}.weight" for table in range(tables))
    name = ".".join(WORDS.get(part, part) for part in ours.split("."))
    return (f"local_decoder.{name}" if ours == "lm_head.weight" else name,)


def describe(root: Fields, entropy_root: Fields | None = None) -> Description:
    """What a directory holds.

    Args:
        root: the content of its `params.json` or `config.json`.
        entropy_root: the same of its directory `entropy_model`; None without one.

    Raises:
        CheckpointError: names the field that our model cannot express.
    """
    args = root.section("args" if root.has("args") else "model", MODEL_DEFAULTS)
    model = _describe_model(args)
    # The rule that the model was trained with, else the one that its entropy model came with, else its own arguments.
    roots = [root] if entropy_root is None else [root, entropy_root]
    rules = [place.section("data").section("patcher_args", PATCHER_DEFAULTS) for place in roots]
    patcher = _describe_patcher(next((rule for rule in rules if rule), args.renamed(PATCHER_FIELDS)))
    if patcher is None or patcher.method != "entropy":
        return Description(model, patcher)
    if entropy_root is None:
        return Description(model)
    key = "entropy_model" if entropy_root.has("entropy_model") else "args"
    return Description(model, patcher, _describe_entropy_model(entropy_root.section(key, ENTROPY_DEFAULTS)))


def _describe_model(args: Fields) -> BLTConfig:
    """The shape of a BLT from its arguments."""
    width = args["dim_local_encoder"]
    for name in ("cross_attn_encoder", "cross_attn_decoder", "cross_attn_init_by_pooling"):
        args.expect(name, True, why="the model's patches pool their bytes, and are read and written by cross-attention")
    args.expect("use_local_encoder_transformer", True, why="the model's encoder has layers")
    args.expect("downsampling_by_pooling", "max", why="the model pools by the maximum")
    args.expect("dim_token", None, width, why="bytes have the width of the local models")
    args.expect("dim_local_decoder", width, why="the local models have the same width")
    if args["n_layers_local_encoder"] != 1:
        args.expect("cross_attn_all_layers_encoder", False, why="the model's encoder has one cross-attention")
    if args["n_layers_local_decoder"] != 1:
        args.expect("cross_attn_all_layers_decoder", True, why="every layer of the model's decoder has cross-attention")
    for side in ("encoder", "decoder"):
        args.expect(f"cross_attn_window_{side}", None, 1, why="bytes and patches see one patch")
        args.expect(
            f"n_heads_local_{side}", args["cross_attn_nheads"], why="cross-attention has the heads of its layer"
        )
    args.expect("n_kv_heads", None, args["cross_attn_nheads"], why="cross-attention has no grouped heads there")
    args.expect("head_dim", None, why="heads share the width of the model")
    args.expect("weight_tying", False, why="the model's head has weights of its own")
    args.expect("tie_local_encoder_decoder_logits", False, why="the model's head has weights of its own")
    args.expect("encoder_enable_byte_ngrams", False, why="the model's n-grams are hashed")
    args.expect("use_rope", True, why="the model's positions are rotary")
    args.expect("non_linearity", "swiglu", why="the model's feed-forward layers are SwiGLU")
    args.expect("norm_type", "rmsnorm", why="the model's norms are RMSNorm")
    args.expect("pre_norm", True, why="the model's norms come first")
    args.expect("pm_size", 0, why="the model reads the vocabulary that it writes")

    def stack(part: str, window: int | None, kv_heads: int | None = None) -> TransformerConfig:
        dim, layers, heads = (args[f"{name}_{part}"] for name in ("dim", "n_layers", "n_heads"))
        return _stack(args, dim, layers, heads, window, kv_heads)

    window, sizes = args["local_attention_window_len"], args["encoder_hash_byte_group_size"]
    if isinstance(sizes, str):
        sizes = [int(size) for size in sizes.split(",") if size]
    return BLTConfig(
        stack("local_encoder", window),
        stack("global", None, args["n_kv_heads_global"]),
        stack("local_decoder", window),
        slots_per_patch=args["cross_attn_k"],
        ngram_sizes=tuple(sizes or ()),
        hash_rows=args["encoder_hash_byte_group_vocab"],
        hash_functions=args["encoder_hash_byte_group_nb_functions"] if sizes else 1,
        vocab_size=args["vocab_size"],
    )


def _describe_entropy_model(args: Fields) -> EntropyModelConfig:
    """The shape of an entropy model from its arguments."""
    args.expect("weight_tying", False, why="the model's head has weights of its own")
    args.expect("head_dim", None, why="heads share the width of the model")
    shape = _stack(args, args["dim"], args["n_layers"], args["n_heads"], args["sliding_window"], args["n_kv_heads"])
    return EntropyModelConfig(shape, args["vocab_size"])


def _describe_patcher(args: Fields) -> PatcherConfig | None:
    """How text is cut; None where no rule is said.

    The rule "combined" is ours, without the published accident by which the fourth token never starts a patch.
    """
    mode, longest = args["patching_mode"], args["max_patch_length"]
    if mode is None:
        return None
    args.expect("patching_mode", "entropy", "space", why="the model's patches are cut by one of these")
    if mode == "space":
        return PatcherConfig("spaces", max_patch_length=longest)
    if args["monotonicity"]:
        return PatcherConfig(rule="monotonic", threshold=args["threshold"], max_patch_length=longest)
    if args["threshold_add"] is not None:
        return PatcherConfig(
            rule="combined", threshold=args["threshold"], delta=args["threshold_add"], max_patch_length=longest
        )
    return PatcherConfig(threshold=args["threshold"], max_patch_length=longest)


def _stack(
    args: Fields, dim: int, layers: int, heads: int, window: int | None, kv_heads: int | None
) -> TransformerConfig:
    return TransformerConfig(
        dim,
        layers,
        heads,
        ffn_width(dim, args["ffn_dim_multiplier"], args["multiple_of"]),
        window=window,
        rope_theta=args["rope_theta"],
        norm_eps=args["norm_eps"],
        num_kv_heads=None if kv_heads in (None, heads) else kv_heads,
    )


def ffn_width(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Two thirds of 4 * dim, times the multiplier, up to the next multiple."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


def model_args(config: BLTConfig) -> dict[str, Any]:
    """The arguments that say of `config` what they can; see `check_expressible`."""
    encoder, latent, decoder = config.encoder, config.latent, config.decoder
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "dim_global": latent.dim,
        "n_layers_global": latent.num_layers,
        "n_heads_global": latent.num_heads,
        "n_kv_heads_global": latent.num_kv_heads,
        "dim_local_encoder": encoder.dim,
        "n_layers_local_encoder": encoder.num_layers,
        "n_heads_local_encoder": encoder.num_heads,
        "dim_local_decoder": decoder.dim,
        "n_layers_local_decoder": decoder.num_layers,
        "n_heads_local_decoder": decoder.num_heads,
        "cross_attn_encoder": True,
        "cross_attn_decoder": True,
        "cross_attn_k": config.slots_per_patch,
        "cross_attn_nheads": encoder.num_heads,
        "cross_attn_all_layers_encoder": False,
        "cross_attn_all_layers_decoder": True,
        "cross_attn_init_by_pooling": True,
        "downsampling_by_pooling": "max",
        "use_local_encoder_transformer": True,
        "encoder_hash_byte_group_size": list(config.ngram_sizes) or None,
        "encoder_hash_byte_group_vocab": config.hash_rows,
        "encoder_hash_byte_group_nb_functions": config.hash_functions,
        "local_attention_window_len": encoder.window,
        "ffn_dim_multiplier": 1.0,
        "multiple_of": _multiple_of(encoder, latent, decoder),
        "norm_eps": encoder.norm_eps,
        "rope_theta": encoder.rope_theta,
    }
    return values


def entropy_args(config: EntropyModelConfig) -> dict[str, Any]:
    """The arguments of an entropy model, likewise."""
    shape = config.transformer
    return {
        "dim": shape.dim,
        "n_layers": shape.num_layers,
        "n_heads": shape.num_heads,
        "n_kv_heads": shape.num_kv_heads,
        "ffn_dim_multiplier": 1.0,
        "multiple_of": _multiple_of(shape),
        "norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "sliding_window": shape.window,
        "vocab_size": config.vocab_size,
    }


def patcher_args(config: PatcherConfig | None) -> dict[str, Any]:
    """The arguments of a patcher, likewise."""
    if config is None:
        return {"patching_mode": None}
    if config.method == "spaces":
        return {"patching_mode": "space", "max_patch_length": config.max_patch_length}
    return {
        "patching_mode": "entropy",
        "threshold": config.threshold,
        "threshold_add": config.delta,
        "monotonicity": config.rule == "monotonic",
        "max_patch_length": config.max_patch_length,
    }


def _multiple_of(*stacks: TransformerConfig) -> int:
    """The published rounding of feed-forward widths where it gives these, else another that does, if there is one."""
    for multiple in (256, *(1 << power for power in range(12, -1, -1))):
        if all(ffn_width(stack.dim, 1.0, multiple) == stack.ffn_dim for stack in stacks):
            return multiple
    return 256
