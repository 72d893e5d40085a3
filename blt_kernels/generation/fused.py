"""Transformer layers for steps of a few rows, in fewer and larger operations than the modules of the model.

A step of a small model takes as long as its operations take to start, so that their number decides: the products of
queries, keys and values are one here, gate and up are one, gains of norms are in the weights, and residuals are added
by the products. That needs copies of weights, so that it is for small layers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..model.transformer import TransformerLayer, rotate

_LARGEST = 1 << 24  # parameters of a stack; beyond, reading weights takes longer than starting operations

StepLayer = Callable[[torch.Tensor, Any], torch.Tensor]


def step_layers(layers: nn.ModuleList) -> list[StepLayer]:
    """The layers of a stack as functions of x [B, 1, dim] and a plan, for steps: fused where that pays."""
    stack: Iterable[Any] = layers
    parameters = list(layers.parameters())
    if all(p.dtype == torch.float32 for p in parameters) and sum(p.numel() for p in parameters) <= _LARGEST:
        return [FusedLayer(layer) for layer in stack]
    return list(stack)


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """float32 x [..., dim] over its root mean square, in fewer passes than `torch.rms_norm` takes on the CPU."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return x * square.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """What `norm` computes, up to rounding."""
    return normalised(x, norm.eps or 0.0) * norm.weight if x.dtype == torch.float32 else norm(x)


class FusedLayer:
    """What `TransformerLayer` computes, up to rounding, with weights as they are when this is made."""

    def __init__(self, layer: TransformerLayer):
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        head_dim = attention.head_dim
        self.heads = [projection.out_features // head_dim for projection in projections]
        self.qkv = torch.cat([p.weight for p in projections]) * layer.input_layernorm.weight
        self.gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)) * layer.post_attention_layernorm.weight
        self.o, self.down = attention.o_proj.weight.t(), mlp.down_proj.weight.t()
        self.eps = layer.input_layernorm.eps or 0.0

    def __call__(self, x: torch.Tensor, plan: Any) -> torch.Tensor:
        rows, _, dim = x.shape
        x = x.view(rows, dim)
        heads = F.linear(normalised(x, self.eps), self.qkv).view(rows, 1, sum(self.heads), -1)
        turned = rotate(heads[:, :, : -self.heads[2]], plan.rotation)  # of queries and keys together
        q, k = turned[:, :, : self.heads[0]], turned[:, :, self.heads[0] :]
        y = plan.attend(q, k, heads[:, :, -self.heads[2] :])
        x = torch.addmm(x, y.reshape(rows, -1), self.o)
        gate, up = F.linear(normalised(x, self.eps), self.gate_up).chunk(2, -1)
        return torch.addmm(x, F.silu(gate) * up, self.down).view(rows, 1, dim)
