"""FLOPs per byte of BLTs and token models, by component: the paper's formula, and one that leaves nothing out.

A multiplication and an addition are two FLOPs. Norms, activations, softmax, rotary positions, pooling and lookups
(input embeddings, hash tables) count as 0. Backward counts as twice forward.

The paper is "Byte Latent Transformer: Patches Scale Better Than Tokens" (arXiv 2412.09871), section 4.5 and the
appendix of FLOPs equations. With h the width, l the layers, m the positions seen, V the outputs of the head, n_ctx the
context and n_p the patch size in bytes, w a window and K the slots per patch, FLOPs per byte are

    Transf(h_G, l_G, m = n_ctx / n_p, V = 0) / n_p
    + Transf(h_E, l_E, m = w_E, V = 0) + Transf(h_D, l_D, m = w_D, V = 256)
    + Cross(h_E, l_E, m = n_p, r = n_p / K) * K / n_p + Cross(h_D, l_D, m = K, r = K / n_p)

    Transf = l * (4h (m + 1) / 2 + (2 + 2) 2h^2 + 2 * 2h * 4h) + 2hV     per position: attention, QKVO, FFN, head
    Cross = l * (4h (m + 1) / 2 + (2r + 2) 2h^2)                         per query, of r keys a query

Three ways to count:

- "paper": these formulas, literally. So the FFN is 4h wide with two matrices whatever `ffn_dim` (a SwiGLU of 8h/3
  costs the same), a window of w counts (w + 1) / 2 keys, a cross-attention (m + 1) / 2 of the m keys that it sees,
  every encoder layer has a cross-attention, and the head has 256 outputs. Projections between widths and the entropy
  model are left out.
- "inclusive": what our models need. The real FFN, grouped heads of keys and values, causal attention over exactly the
  keys that are seen (a window of w sees w once the text is that long), all keys of a cross-attention, the one
  cross-attention of our encoder, the `vocab_size` outputs of the head, the projections (between patches and slots, into
  the latent width, of hash tables) and the entropy model.
- "counter": what `torch.utils.flop_counter.FlopCounterMode` counts for our modules in rows of `context_bytes`: as
  "inclusive", but attention ignores causality, and a window is computed in blocks of half a window that read three.

Importing this module registers our ops with that counter, see `blt_kernels.flops`. On the CPU the counter of torch 2.13
misses torch's own fused attention; under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` it sees it, with 4 products
in backward.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .. import flops as _formulas  # noqa: F401, registers our ops with torch's counter
from .._checks import check_choice, check_int, check_number, fail_type
from .config import BLTConfig, EntropyModelConfig, TransformerConfig

COUNTS = ("paper", "inclusive", "counter")


@dataclasses.dataclass(frozen=True)
class Ledger:
    """FLOPs per byte of text.

    Attributes:
        components: of a forward pass, by component, in the order of computation.
        frozen: components that are not trained, so that training costs their forward pass alone.
    """

    components: dict[str, float]
    frozen: tuple[str, ...] = ()

    @property
    def training_components(self) -> dict[str, float]:
        """FLOPs per byte of a training step, by component."""
        return {name: flops * (1 if name in self.frozen else 3) for name, flops in self.components.items()}

    @property
    def forward(self) -> float:
        """FLOPs per byte of a forward pass, which is inference too."""
        return sum(self.components.values())

    @property
    def training(self) -> float:
        """FLOPs per byte of a training step: three times forward, and once for what is frozen."""
        return sum(self.training_components.values())


def blt_flops(
    config: BLTConfig,
    patch_size: float,
    *,
    context_bytes: float,
    entropy_model: EntropyModelConfig | None = None,
    count: str = "inclusive",
) -> Ledger:
    """FLOPs per byte of a BLT.

    Args:
        config: its shapes.
        patch_size: mean bytes per patch. For batches with empty slots, bytes per slot: the latent transformer computes
            every slot.
        context_bytes: bytes of the sequences that attention is averaged over.
        entropy_model: the model that makes the patches, frozen. The paper leaves it out, and so does "paper".
        count: "paper", "inclusive" or "counter": see the module.

    Raises:
        TypeError: configs of other types, numbers that are none.
        ValueError: patch_size < 1, context_bytes < patch_size, an unknown count.
    """
    op = "blt_flops"
    _check_type(op, "config", config, BLTConfig)
    check_number(op, "patch_size", patch_size, 1)
    check_number(op, "context_bytes", context_bytes, patch_size)
    if entropy_model is not None:
        _check_type(op, "entropy_model", entropy_model, EntropyModelConfig)
    check_choice(op, "count", count, COUNTS)

    encoder, latent, decoder = config.encoder, config.latent, config.decoder
    local, slots = encoder.dim, config.slots_per_patch
    paper = count == "paper"
    parts: dict[str, float] = {}
    if not paper and config.ngram_sizes and config.hash_dim not in (None, local):
        parts["hash projection"] = 2 * config.hash_dim * local  # type: ignore[operator]
    parts |= _layers("encoder", encoder, context_bytes, count)
    cross_layers = encoder.num_layers if paper else 1
    parts |= _cross("encoder", cross_layers, encoder, slots / patch_size, 1, patch_size, count)
    if not paper:
        # Encoder d -> K*d and decoder D -> K*d; K*d -> D where the widths differ.
        matrices = slots * local * (local + latent.dim + (latent.dim if slots * local != latent.dim else 0))
        parts["patch projections"] = 2 * matrices / patch_size
    parts |= {
        name: flops / patch_size for name, flops in _layers("latent", latent, context_bytes / patch_size, count).items()
    }
    parts |= _cross("decoder", decoder.num_layers, decoder, 1, slots / patch_size, slots, count)
    parts |= _layers("decoder", decoder, context_bytes, count)
    parts["head"] = 2 * local * (256 if paper else config.vocab_size)
    if entropy_model is None or paper:
        return Ledger(parts)
    frozen = "entropy model"
    parts[frozen] = entropy_model_flops(entropy_model, context_bytes=context_bytes, count=count).forward
    return Ledger(parts, (frozen,))


def token_flops(
    config: TransformerConfig,
    vocab_size: int,
    bytes_per_token: float,
    *,
    context_bytes: float,
    count: str = "inclusive",
) -> Ledger:
    """FLOPs per byte of a transformer over tokens, such as a BPE model: those per token over `bytes_per_token`.

    Args:
        config: its shapes. Input embeddings are lookups.
        vocab_size: outputs of the head.
        bytes_per_token: mean; the paper takes 3.7 for the tokenizer of Llama 2 and 4.4 for that of Llama 3.
        context_bytes: bytes of the sequences that attention is averaged over, the same for models that are compared.
        count: "paper", "inclusive" or "counter": see the module.

    Raises:
        TypeError: a config of another type, numbers that are none.
        ValueError: vocab_size < 1, bytes_per_token < 1, context_bytes < bytes_per_token, an unknown count.
    """
    op = "token_flops"
    _check_type(op, "config", config, TransformerConfig)
    check_int(op, "vocab_size", vocab_size, 1)
    check_number(op, "bytes_per_token", bytes_per_token, 1)
    check_number(op, "context_bytes", context_bytes, bytes_per_token)
    check_choice(op, "count", count, COUNTS)
    parts = _layers("", config, context_bytes / bytes_per_token, count) | {"head": 2 * config.dim * vocab_size}
    return Ledger({name: flops / bytes_per_token for name, flops in parts.items()})


def entropy_model_flops(config: EntropyModelConfig, *, context_bytes: float, count: str = "inclusive") -> Ledger:
    """FLOPs per byte of an entropy model that is trained or run by itself: `token_flops` at one byte a token.

    Tables of n-grams are lookups, so that a model without layers costs its head alone.
    """
    _check_type("entropy_model_flops", "config", config, EntropyModelConfig)
    return token_flops(config.transformer, config.vocab_size, 1, context_bytes=context_bytes, count=count)


def equal_token_width(
    flops_per_byte: float, num_layers: int, vocab_size: int, bytes_per_token: float, *, context_bytes: float
) -> float:
    """Width of the transformer over tokens whose `token_flops` by the paper's count are `flops_per_byte`.

    The other arguments are those of `token_flops`. The positive root of a quadratic, to be rounded to a multiple of
    heads; a SwiGLU of 8/3 of the width makes it the inclusive count too.

    Raises:
        TypeError: numbers that are none.
        ValueError: flops_per_byte < 0, the others < 1, context_bytes < bytes_per_token.
    """
    op = "equal_token_width"
    check_number(op, "flops_per_byte", flops_per_byte, 0)
    check_int(op, "num_layers", num_layers, 1)
    check_int(op, "vocab_size", vocab_size, 1)
    check_number(op, "bytes_per_token", bytes_per_token, 1)
    check_number(op, "context_bytes", context_bytes, bytes_per_token)
    square = num_layers * (8 + 16)  # QKVO and FFN
    linear = num_layers * 4 * _keys_seen(None, context_bytes / bytes_per_token, "paper") + 2 * vocab_size
    return (math.sqrt(linear**2 + 4 * square * flops_per_byte * bytes_per_token) - linear) / (2 * square)


def _layers(part: str, config: TransformerConfig, context: float, count: str) -> dict[str, float]:
    """FLOPs per position of the layers of `part`, averaged over `context` positions."""
    h, layers = config.dim, config.num_layers
    ffn = 2 * 2 * h * 4 * h if count == "paper" else 3 * 2 * h * config.ffn_dim
    parts = {
        "attention": layers * 4 * h * _keys_seen(config.window, context, count),
        "qkvo": layers * 2 * 2 * h * (h + _kv_dim(config, count)),
        "ffn": layers * ffn,
    }
    return {f"{part} {name}".strip(): float(flops) for name, flops in parts.items()}


def _keys_seen(window: int | None, context: float, count: str) -> float:
    """Keys that count for a query of self-attention, averaged over `context` positions."""
    seen = context if window is None else min(window, context)
    if count == "paper":
        return (seen + 1) / 2
    if count == "inclusive":
        return seen - seen * (seen - 1) / (2 * context)  # position i sees min(i + 1, seen)
    if seen == context:
        return context
    block = math.ceil(seen / 2)  # as in model.transformer.attend; the last block is padded
    return 3 * block * math.ceil(context / block) * block / context


def _kv_dim(config: TransformerConfig, count: str) -> int:
    """Width of keys and values; the paper knows no grouped heads."""
    return config.dim if count == "paper" else config.kv_dim


def _cross(
    part: str, layers: int, config: TransformerConfig, queries: float, keys: float, seen: float, count: str
) -> dict[str, float]:
    """FLOPs per byte of cross-attention in which a query sees `seen` keys; `queries` and `keys` are rows per byte."""
    h = config.dim
    seen = (seen + 1) / 2 if count == "paper" else seen
    return {
        f"{part} cross-attention": layers * queries * 4 * h * seen,
        f"{part} cross qkvo": layers * 2 * 2 * h * (queries * h + keys * _kv_dim(config, count)),
    }


def _check_type(op: str, argument: str, value: Any, wanted: type) -> None:
    if not isinstance(value, wanted):
        raise fail_type(op, argument, wanted.__name__, type(value).__name__)
