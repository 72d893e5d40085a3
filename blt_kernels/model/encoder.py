"""The local encoder, which turns bytes into patches."""

from __future__ import annotations

import torch
from torch import nn

from ..layout import PatchLayout
from ..nn import EncoderCrossAttention
from ..ops.patch_pool import patch_pool
from .activations import LayerStack
from .config import BLTConfig
from .transformer import Sequences, init_weights, make_layers, plan_attention


class LocalEncoder(LayerStack):
    """Layers over bytes; then each patch pools its bytes into K queries that read the same bytes by cross-attention."""

    def __init__(self, config: BLTConfig):
        super().__init__()
        self.config = config
        shape = config.encoder
        self.embed_tokens = nn.Embedding(config.vocab_size, shape.dim)
        self.layers = make_layers(shape)
        self.patch_embedding_projection = nn.Linear(shape.dim, config.slots_per_patch * shape.dim, bias=False)
        # There is one, after the last layer. It is in a list so that its parameters have their published names.
        self.cross_attn_layers = nn.ModuleList(
            [EncoderCrossAttention(shape.dim, shape.num_heads, eps=shape.norm_eps, num_kv_heads=shape.num_kv_heads)]
        )
        init_weights(self, shape.num_layers)

    def forward(self, x: torch.Tensor, layout: PatchLayout, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
        """Byte embeddings x [B, N, d] -> byte states [B, N, d] and patches [B, C, K*d]."""
        plan = plan_attention(self.config.encoder, x, sequences)
        for layer in self.layers:
            x = self.run_layer(layer, x, plan)
        return x, self.pool(x, layout)

    def pool(self, x: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        """Byte states x [B, N, d], after the last layer -> patches [B, C, K*d]."""
        slots = self.patch_embedding_projection(patch_pool(x, layout, reduce="max")).type_as(x)  # [B, C, K*d]
        slots = slots.unflatten(-1, (-1, x.shape[-1])).flatten(1, 2)  # [B, C*K, d]
        # The published residual is added twice.
        slots = torch.add(self.cross_attn_layers[0](slots, x, layout), slots, alpha=2)
        return slots.unflatten(1, (-1, self.config.slots_per_patch)).flatten(2)
