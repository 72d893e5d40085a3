"""encoder_cross_attention and decoder_cross_attention beside a dense mask and the gather formulation.

    python benchmarks/cross_attention.py [--json] [--case SUBSTRING] [--rounds 15]

"gather" is the best that plain PyTorch does: the decoder gathers the K key and value rows of each byte's patch; the
encoder scatters softmax terms into the patches. "compiled" is the same under torch.compile, "dense" is
scaled_dot_product_attention under a bytes x slots mask that is built beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn.functional as F
from harness import Case, main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from helpers import make_layout, random_lengths

import blt_kernels
from blt_kernels import PatchLayout

# A backward graph is built once and run again and again, which donated buffers forbid.
torch._functorch.config.donated_buffer = False

Tensors = tuple[torch.Tensor, ...]
Attention = Callable[..., torch.Tensor]


def gather_decoder(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
    batch, _, heads, width = q.shape
    slots = k.shape[1] // layout.capacity
    ids = layout.visible_ids.long()
    row = torch.arange(batch)[:, None]
    k, v = (x.view(batch, layout.capacity, slots, heads, width)[row, ids.clamp(min=0)] for x in (k, v))
    scores = (q[:, :, None] * k).sum(-1) * width**-0.5  # [B, N, K, H]
    weights = scores.softmax(2) * (ids >= 0)[:, :, None, None]
    return (weights[..., None] * v).sum(2)


def gather_encoder(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
    batch, _, heads, width = k.shape
    capacity = layout.capacity
    slots = q.shape[1] // capacity
    ids = layout.patch_ids.long()
    row = torch.arange(batch)[:, None]
    q_of_byte = q.view(batch, capacity, slots, heads, width)[row, ids.clamp(min=0)]  # [B, N, K, H, E]
    scores = (q_of_byte * k[:, :, None]).sum(-1) * width**-0.5  # [B, N, K, H]
    scores = scores.masked_fill((ids < 0)[:, :, None, None], -torch.inf)
    index = ids.clamp(min=0)[:, :, None, None].expand_as(scores)
    top = scores.new_full((batch, capacity, slots, heads), -torch.inf).scatter_reduce(1, index, scores.detach(), "amax")
    terms = (scores - top.gather(1, index)).exp()
    total = terms.new_zeros(top.shape).scatter_add(1, index, terms)
    weights = terms / total.gather(1, index)
    out = q.new_zeros(batch, capacity, slots, heads, width)
    values = weights[..., None] * v[:, :, None]
    return out.scatter_add(1, index[..., None].expand_as(values), values).view_as(q)


def dense_mask(op: str, layout: PatchLayout, slots: int) -> torch.Tensor:
    slot = torch.arange(layout.capacity).repeat_interleave(slots)
    if op == "encoder":
        return (layout.patch_ids[:, None, :] == slot[None, :, None])[:, None]  # [B, 1, C*K, N]
    return (layout.visible_ids[:, :, None] == slot)[:, None]  # [B, 1, N, C*K]


def dense(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def cases() -> Iterator[Case]:
    for op, gather in (("encoder", gather_encoder), ("decoder", gather_decoder)):
        ours = getattr(blt_kernels, f"{op}_cross_attention")
        for num_bytes, heads, slots in ((4096, 16, 2), (8192, 16, 2), (16384, 16, 2), (8192, 12, 2), (8192, 16, 4)):
            layout = make_layout(random_lengths(num_bytes, 4.5))
            yield from attention_cases(op, ours, gather, layout, heads, slots)


def attention_cases(
    op: str, ours: Attention, gather: Attention, layout: PatchLayout, heads: int, slots: int
) -> Iterator[Case]:
    num_bytes, num_slots, width = layout.num_bytes, layout.capacity * slots, 64
    rows, columns = (num_slots, num_bytes) if op == "encoder" else (num_bytes, num_slots)
    q, grad = (torch.randn(1, rows, heads, width) for _ in range(2))
    k, v = (torch.randn(1, columns, heads, width) for _ in range(2))
    size = heads * width * 4
    shapes = {"N": num_bytes, "H": heads, "E": width, "K": slots}
    mask = dense_mask(op, layout, slots) if num_bytes == 4096 else None
    compiled = torch.compile(gather)

    def functions(*tensors: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
        variants = {
            "ours": lambda: ours(*tensors, layout),
            "gather": lambda: gather(*tensors, layout),
            "gather compiled": lambda: compiled(*tensors, layout),
        }
        if mask is not None:
            variants["dense"] = lambda: dense(mask, *tensors)
        return variants

    def close(results: list[Tensors]) -> None:
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                # A dense mask has NaN in rows that see nothing.
                torch.testing.assert_close(a, b.nan_to_num(0), rtol=1e-3, atol=1e-3)

    forward = functions(q, k, v)
    yield Case(
        name=f"{op} forward",
        shapes=shapes,
        variants=forward,
        bytes=(2 * rows + 2 * columns) * size,
        check=lambda: close([(fn(),) for fn in forward.values()]),
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]

    # Graphs are built once: what is timed is backward alone.
    def gradient(fn: Callable[[], torch.Tensor]) -> Callable[[], Tensors]:
        out = fn()
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    backward = {
        name: gradient(fn)
        for name, fn in functions(*leaves).items()
        if name != "dense"  # NaN in rows that see nothing
    }
    yield Case(
        name=f"{op} backward",
        shapes=shapes,
        variants=backward,
        bytes=(3 * rows + 4 * columns) * size,
        check=lambda: close([fn() for fn in backward.values()]),
    )


if __name__ == "__main__":
    main("cross_attention", cases)
