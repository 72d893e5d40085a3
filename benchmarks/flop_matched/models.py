"""The models that are compared: a token model, and BLTs whose latent model is grown until the FLOPs per byte match."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from blt_kernels import PatchLayout, patch_gather
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig
from blt_kernels.model.flops import Ledger, blt_flops
from blt_kernels.model.transformer import init_weights
from blt_kernels.training.runs import seeded

TOLERANCE = 0.02  # of the token model's inclusive FLOPs per byte
FFN_STEP = 16
FFN_RATIOS = (2.0, 4.0)  # feed-forward width over width, of a grown latent model
SWIGLU_RATIO = 8 / 3


@dataclasses.dataclass(frozen=True)
class Variant:
    """A BLT of the comparison.

    Attributes:
        method: how text is cut, as in PatcherConfig.
        patch_size: the mean bytes per patch to reach; None for spaces, where the text decides.
        ngrams, cross_attention: off in the ablations.
        ngram_entropy: the entropies are those of an entropy model of n-gram tables, without layers.
        tuned_as: the model whose learning rate it takes; None: it is tuned itself.
    """

    name: str
    method: str = "entropy"
    patch_size: float | None = None
    ngrams: bool = True
    cross_attention: bool = True
    tuned_as: str | None = None
    ngram_entropy: bool = False


TOKEN = "token"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("blt-4.5", patch_size=4.5),
        Variant("blt-6", patch_size=6),
        Variant("blt-8", patch_size=8),
        Variant("blt-spaces", "spaces"),
        Variant("blt-fixed-6", "fixed", 6),
        Variant("blt-4.5-ngram-entropy", patch_size=4.5, tuned_as="blt-4.5", ngram_entropy=True),
        Variant("blt-4.5-no-ngrams", patch_size=4.5, ngrams=False, tuned_as="blt-4.5"),
        Variant("blt-4.5-no-cross-attention", patch_size=4.5, cross_attention=False, tuned_as="blt-4.5"),
    )
}


class NoEncoderCrossAttention(nn.Module):
    """The slots of a patch are the projection of its pooled bytes, and nothing is added to them."""

    def forward(self, slots: torch.Tensor, x: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        return slots.new_zeros(())


class GatherPatches(nn.Module):
    """A byte adds a projection of the last finished patch, where cross-attention would read the patch's slots."""

    def __init__(self, slots_per_patch: int, dim: int):
        super().__init__()
        self.slots_per_patch = slots_per_patch
        self.proj = nn.Linear(slots_per_patch * dim, dim, bias=False)

    def forward(self, x: torch.Tensor, slots: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        patches = slots.unflatten(1, (-1, self.slots_per_patch)).flatten(2)  # [B, C, K*d]
        return patch_gather(self.proj(patches), layout, "visible")


def without_cross_attention(model: BLT) -> BLT:
    """Takes the cross-attention out of `model`, in place: pooled patches on the way in, gathered ones on the way out.

    What the paper's ablation over cross-attention calls none.
    """
    config = model.config
    model.local_encoder.cross_attn_layers = nn.ModuleList([NoEncoderCrossAttention()])
    gathers = nn.ModuleList(
        GatherPatches(config.slots_per_patch, config.decoder.dim) for _ in range(config.decoder.num_layers)
    )
    init_weights(gathers, config.decoder.num_layers)
    model.local_decoder.cross_attn_layers = gathers
    return model


def build(config: BLTConfig | EntropyModelConfig, *, seed: int, cross_attention: bool = True) -> BLT | EntropyModel:
    """A model with initial weights that depend on `seed` alone; an EntropyModelConfig is that of a token model too."""
    with seeded(seed):
        if isinstance(config, EntropyModelConfig):
            return EntropyModel(config)
        model = BLT(config)
        return model if cross_attention else without_cross_attention(model)


def variant_flops(variant: Variant, config: BLTConfig, patch_size: float, **arguments: Any) -> Ledger:
    """`blt_flops`, with the ablation of cross-attention counted as it is computed."""
    ledger = blt_flops(config, patch_size, **arguments)
    if variant.cross_attention:
        return ledger
    parts = {name: flops for name, flops in ledger.components.items() if "cross" not in name}
    dim = config.decoder.dim
    parts["gather projections"] = config.decoder.num_layers * 2 * config.slots_per_patch * dim * dim / patch_size
    return Ledger(parts, ledger.frozen)


def grow_latent(base: BLTConfig, target: float, flops: Callable[[BLTConfig], float], aspect: float) -> BLTConfig:
    """`base` with the latent model whose layers, width and feed-forward width bring `flops` to `target`.

    Of all that match within 2 %, the one whose width per layer is nearest to `aspect` and whose feed-forward width is
    nearest to 8/3 of the width. The head size stays.

    Args:
        target: FLOPs per byte.
        flops: FLOPs per byte of a config.
        aspect: width over layers, that of the token model.

    Raises:
        ValueError: no latent model matches; the local models alone may cost more than `target`.
    """
    head = base.latent.head_dim
    best: tuple[float, BLTConfig] | None = None
    for layers in range(1, 65):
        for heads in range(1, 129):
            dim = heads * head

            def at(ffn: int, layers: int = layers, heads: int = heads, dim: int = dim) -> BLTConfig:
                latent = dataclasses.replace(base.latent, dim=dim, num_layers=layers, num_heads=heads, ffn_dim=ffn)
                return dataclasses.replace(base, latent=latent)

            low, high = (flops(at(ffn)) for ffn in (FFN_STEP, 2 * FFN_STEP))
            ffn = FFN_STEP * round(1 + (target - low) / (high - low))  # FLOPs are linear in it
            if ffn > FFN_RATIOS[1] * dim:
                continue
            if ffn < FFN_RATIOS[0] * dim:
                break  # wider ones have less room still
            if abs(flops(at(ffn)) / target - 1) > TOLERANCE:
                continue
            distance = abs(math.log(dim / layers / aspect)) + abs(math.log(ffn / dim / SWIGLU_RATIO))
            if best is None or distance < best[0]:
                best = distance, at(ffn)
    if best is None:
        local = flops(at(FFN_STEP, 1, 1, head))
        raise ValueError(
            f"grow_latent: target: expected FLOPs per byte that some latent model reaches (the smallest needs "
            f"{local:.4g}), got {target:.4g}"
        )
    return best[1]
