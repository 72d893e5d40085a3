"""The local decoder, which turns patches back into bytes."""

from __future__ import annotations

import torch
from torch import nn

from ..layout import PatchLayout
from ..nn import DecoderCrossAttention
from .activations import LayerStack
from .config import BLTConfig
from .transformer import AttentionPlan, Sequences, init_weights, make_layers, plan_attention


class LocalDecoder(LayerStack):
    """Layers over bytes; before each, a byte reads the K slots of the last patch finished before the next byte."""

    def __init__(self, config: BLTConfig):
        super().__init__()
        self.config = config
        shape = config.decoder
        self.patch_embedding_projection = nn.Linear(config.latent.dim, config.slots_per_patch * shape.dim, bias=False)
        self.cross_attn_layers = nn.ModuleList(
            DecoderCrossAttention(shape.dim, shape.num_heads, eps=shape.norm_eps, num_kv_heads=shape.num_kv_heads)
            for _ in range(shape.num_layers)
        )
        self.layers = make_layers(shape)
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        init_weights(self, shape.num_layers)

    def forward(
        self, x: torch.Tensor, patches: torch.Tensor, layout: PatchLayout, sequences: Sequences
    ) -> torch.Tensor:
        """The encoder's byte states x [B, N, d] and latent patches [B, C, D] -> [B, N, d], normalised."""
        plan = plan_attention(self.config.decoder, x, sequences)
        slots = self.patch_embedding_projection(patches).type_as(x)
        slots = slots.unflatten(-1, (-1, x.shape[-1])).flatten(1, 2)  # [B, C*K, d]
        for cross, layer in zip(self.cross_attn_layers, self.layers, strict=True):
            x = self.run_layer(_cross_and_layer, cross, layer, x, slots, layout, plan)
        return self.norm(x)


def _cross_and_layer(
    cross: nn.Module,
    layer: nn.Module,
    x: torch.Tensor,
    slots: torch.Tensor,
    layout: PatchLayout,
    plan: AttentionPlan,
) -> torch.Tensor:
    x = torch.add(cross(x, slots, layout), x, alpha=2)  # the published residual is added twice
    return layer(x, plan)
