"""Transformer layers over bytes or patches: pre-norm, rotary positions, SwiGLU, full or windowed causal attention."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor

from ..nn import cast_once
from .config import RopeScaling, TransformerConfig
from .packed_attention import Buckets, Varlen, plan_packed

_BLOCK_KEYS = 1.5  # of windowed attention: keys computed for each key of the window


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of rows of L positions, within which attention stays.

    Attributes:
        ids: int64 [1 or B, L], non-decreasing: the sequence of each position.
        cu_seqlens: [S+1], of a packed row (B = 1): where its sequences start and end. `ids` follow from it.
        longest: no sequence of a packed row has more positions; None where nobody has said. It bounds the work where
            attention needs a mask, and the kernels for CUDA are launched by it.
    """

    ids: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    longest: int | None = None

    @staticmethod
    def packed(cu_seqlens: torch.Tensor, length: int, longest: int | None) -> Sequences:
        """Those of a packed row; the tail after the last sequence counts as one more."""
        positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)[None]
        return Sequences(torch.searchsorted(cu_seqlens[1:], positions, right=True), cu_seqlens, longest)


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """What all self-attention layers of a stack share in one forward pass.

    Attributes:
        rotation: float32 [1 or B, L, 1, E/2, 2], cosine and sine of the angle by which each pair of entries turns.
        mask: bool, True where a query sees a key. None: plainly causal. [1 or B, 1, L, L], or, with `block`, one mask
            per block of queries: [B * blocks, 1, block, 3 * block].
        block: queries that attend together in windowed attention; 0 where attention is not windowed.
        packed: how the sequences of a packed row attend without a mask; None where there is one, or no packed row.
    """

    rotation: torch.Tensor
    mask: torch.Tensor | None
    block: int
    packed: Varlen | Buckets | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See the function `attend`. Generation gives layers a plan of its own, which adds k and v to a cache."""
        return attend(q, k, v, self)


def make_rotation(config: TransformerConfig, positions: torch.Tensor) -> torch.Tensor:
    """Cosine and sine of the angles of rotary positions int64 [...]: float32 [..., 1, E/2, 2]."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    speeds = config.rope_theta ** (-pairs / config.head_dim)  # radians a position
    if config.rope_scaling is not None:
        speeds = _scaled(speeds, config.rope_scaling)
    angles = positions[..., None, None] * speeds
    return torch.stack((angles.cos(), angles.sin()), -1)


def _scaled(speeds: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    turns = scaling.original_length * speeds / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return speeds * (kept + (1 - kept) / scaling.factor)


def plan_attention(config: TransformerConfig, x: torch.Tensor, sequences: Sequences | None) -> AttentionPlan:
    """The plan for a stack of shape `config` over x [B, L, dim].

    Positions attend only within their sequence; None makes each row one sequence. Rotary positions count from the
    start of the sequence.
    """
    sequence_ids = None if sequences is None else sequences.ids
    batch, length = x.shape[:2]
    positions = torch.arange(length, device=x.device)[None]
    if sequence_ids is not None:
        positions = positions - torch.searchsorted(sequence_ids, sequence_ids)
    rotation = make_rotation(config, positions)

    # No position sees more keys than the longest sequence has.
    longest = length if sequences is None or sequences.longest is None else min(length, sequences.longest)
    if config.window is None and sequences is not None and sequences.cu_seqlens is not None:
        packed = plan_packed(x, sequences.cu_seqlens, sequences.longest, config.head_dim)
        if packed is not None:
            return AttentionPlan(rotation, None, 0, packed)
    window = min(longest, config.window or length)
    if _BLOCK_KEYS * window < length or (config.window is not None and window < length):
        block = -(-window // 2)
        return AttentionPlan(rotation, _window_mask(sequence_ids, batch, length, window, block, x.device), block)
    if sequence_ids is None:
        return AttentionPlan(rotation, None, 0)
    mask = (sequence_ids[:, :, None] == sequence_ids[:, None, :]).tril()
    return AttentionPlan(rotation, mask[:, None], 0)


def _window_mask(
    sequence_ids: torch.Tensor | None, batch: int, length: int, window: int, block: int, device: torch.device
) -> torch.Tensor:
    """bool [B * blocks, 1, block, 3 * block]: what each block of queries sees of itself and of the two before it."""
    if sequence_ids is None:
        sequence_ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    tail = -length % block
    # The padding in front is a sequence of its own, and so is the tail, whose queries see at least themselves.
    queries = F.pad(sequence_ids, (0, tail), value=-2).expand(batch, -1).unflatten(1, (-1, block))
    keys = _with_two_before(F.pad(queries, (0, 0, 2, 0), value=-1))
    distance = torch.arange(2 * block, 3 * block, device=device)[:, None] - torch.arange(3 * block, device=device)
    near = (distance >= 0) & (distance < window)
    mask = (queries[..., :, None] == keys[..., None, :]) & near  # [B, blocks, block, 3 * block]
    return mask.flatten(0, 1)[:, None]


def _with_two_before(blocks: torch.Tensor) -> torch.Tensor:
    """[B, 2 + n, block, ...] -> [B, n, 3 * block, ...]: each block behind the two blocks before it."""
    return torch.cat((blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]), dim=2)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, L, H, E], in at least fp32; entries 2i and 2i + 1 are one pair."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # Inductor fuses real arithmetic and has no complex numbers.
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:
        # This passes over x once, where real arithmetic would pass five times.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """Attention of q [B, L, H, E] to k and v [B, L, Hkv, E] under `plan`: [B, L, H, E]. Hkv divides H.

    Windowed attention costs time and memory linear in L. Queries go in blocks of half a window, and a block sees
    itself and the two blocks before it: 1.5 keys computed for each key seen.
    """
    if k.shape[2] != q.shape[2]:
        # Grouped heads are copied, which is right for every kernel behind these calls.
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    if plan.packed is not None:
        return plan.packed.attend(q, k, v)
    if plan.block == 0 or plan.mask is None:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, L, E]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask, is_causal=plan.mask is None)
        return y.transpose(1, 2)
    (batch, length, *heads), block = q.shape, plan.block
    tail = -length % block
    q = F.pad(q, (0, 0, 0, 0, 0, tail)).reshape(-1, block, *heads)  # [B * blocks, block, H, E]
    front = (0, 0, 0, 0, 2 * block, tail)
    k, v = (_with_two_before(F.pad(t, front).unflatten(1, (-1, block))).flatten(0, 1) for t in (k, v))
    y = _attend_block(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), plan.mask)
    return y.transpose(1, 2).reshape(batch, length + tail, *heads)[:, :length]


def _attend_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of q [blocks, H, block, E] to k and v [blocks, H, 3 * block, E]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # PyTorch's fused kernel for the CPU gains nothing from bf16 and its backward loses by it; on blocks this small
        # plain products train the whole model 1.3 times as fast, and their memory is linear too.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        x = cast_once(x)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = plan.attend(rotate(q, plan.rotation), rotate(k, plan.rotation), v)  # [B, L, H, E]
        return self.o_proj(y.flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = cast_once(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TransformerLayer(nn.Module):
    """x [B, L, dim] -> [B, L, dim]."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), plan)
        return x + self.mlp(self.post_attention_layernorm(x))


def make_layers(config: TransformerConfig) -> nn.ModuleList:
    return nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))


def init_weights(module: nn.Module, num_layers: int) -> None:
    """Truncated normal weights of variance 1 / fan-in, and a further 1 / (2 * num_layers) where a layer's output joins
    the residual stream."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            std = child.in_features**-0.5
            if name.endswith(("o_proj", "down_proj")):
                std /= (2 * num_layers) ** 0.5
        elif isinstance(child, nn.Embedding):
            std = child.embedding_dim**-0.5
        else:
            continue
        if isinstance(child.weight, FakeTensor):
            continue  # it has no values, and trunc_normal_ would look at them
        nn.init.trunc_normal_(child.weight, std=std, a=-3 * std, b=3 * std)
