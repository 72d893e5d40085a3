"""What the benchmarks of both cross-attentions share: shapes, dense masks and FlexAttention.

"reference" is the definition, "dense" is scaled_dot_product_attention under a bytes x slots mask, "flex" compiled
FlexAttention under a block mask; both masks are built beforehand, and what building them costs, beside making our
layout from patch lengths, is the case "mask". "gather" is given in the op's own file, "gather compiled" is the same
under torch.compile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from blt_kernels import PatchLayout

from .cases import Case, Headline, Setting, forward_and_backward, in_report
from .patches import layout_for

HEADS, WIDTH = 16, 64
DENSE_UP_TO = 4096  # bytes: a dense mask is quadratic
FLEX_UP_TO = {"cpu": 16384, "cuda": 65536}  # making a block mask may make a dense one first
Attention = Callable[..., torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Op:
    side: str  # "encoder" or "decoder"
    ours: Attention
    reference: Attention
    gather: Attention
    headlines: Mapping[str, Headline]

    def ids(self, layout: PatchLayout) -> torch.Tensor:
        """The patch whose slots a byte goes with."""
        return layout.patch_ids if self.side == "encoder" else layout.visible_ids


def dense_mask(op: Op, layout: PatchLayout, slots: int) -> torch.Tensor:
    ids = op.ids(layout)
    slot = torch.arange(layout.capacity, device=ids.device).repeat_interleave(slots)
    if op.side == "encoder":
        return (ids[:, None, :] == slot[None, :, None])[:, None]  # [B, 1, C*K, N]
    return (ids[:, :, None] == slot)[:, None]  # [B, 1, N, C*K]


def dense(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def block_mask(op: Op, layout: PatchLayout, slots: int) -> Any:
    ids = op.ids(layout)
    rows, columns = layout.capacity * slots, layout.num_bytes
    if op.side == "encoder":

        def sees(batch, head, query, key):
            return ids[batch, key] == query // slots
    else:
        rows, columns = columns, rows

        def sees(batch, head, query, key):
            return ids[batch, query] == key // slots

    return create_block_mask(sees, 1, None, rows, columns, device=ids.device, _compile=ids.is_cuda)


def flex(attend: Attention, mask: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, block_mask=mask).transpose(1, 2)


def transformers_mask(op: Op, layout: PatchLayout, slots: int, dtype: torch.dtype) -> Callable[[], Any] | None:
    """The mask that Hugging Face's model builds in every forward pass, where transformers is installed."""
    try:
        from transformers.models.blt.modeling_blt import _prepare_patch_cross_attention_mask
    except ImportError:
        return None
    ids = op.ids(layout)
    return lambda: _prepare_patch_cross_attention_mask(
        ids, layout.capacity, layout.num_bytes, op.side == "encoder", slots, dtype
    )


def cases_for(setting: Setting, op: Op) -> Iterator[Case]:
    for num_bytes in setting.sizes():
        chosen = op.headlines if num_bytes == setting.headline_bytes else None
        yield from in_report(cases_of(setting, op, num_bytes, HEADS, 2, "text 4.5"), num_bytes, chosen)
    if setting.quick:
        return
    yield from cases_of(setting, op, 8192, 12, 2, "text 4.5")
    yield from cases_of(setting, op, 8192, HEADS, 4, "text 4.5")
    for kind in ("text 6", "text 8", "one patch", "single bytes"):
        yield from cases_of(setting, op, 8192, HEADS, 2, kind)


def cases_of(setting: Setting, op: Op, num_bytes: int, heads: int, slots: int, kind: str) -> Iterator[Case]:
    layout = layout_for(kind, 1, num_bytes, setting.device)
    rows, columns = num_bytes, layout.capacity * slots
    if op.side == "encoder":
        rows, columns = columns, rows
    q, k, v = (setting.randn(1, length, heads, WIDTH) for length in (rows, columns, columns))
    shapes = {"N": num_bytes, "H": heads, "E": WIDTH, "K": slots, "patches": kind}
    compiled = torch.compile(op.gather, dynamic=False)
    functions: dict[str, Attention] = {
        "ours": lambda q, k, v: op.ours(q, k, v, layout),
        "gather": lambda q, k, v: op.gather(q, k, v, layout),
        "gather compiled": lambda q, k, v: compiled(q, k, v, layout),
    }
    forward_only = []
    if num_bytes <= DENSE_UP_TO:
        functions["reference"] = lambda q, k, v: op.reference(q, k, v, layout)
        functions["dense"] = partial(dense, dense_mask(op, layout, slots))
        forward_only.append("dense")  # its gradient has NaN in rows that see nothing
    if num_bytes <= FLEX_UP_TO[setting.device.type]:
        functions["flex"] = partial(flex, torch.compile(flex_attention, dynamic=False), block_mask(op, layout, slots))
    if setting.device.type == "cpu":
        forward_only.append("flex")  # has no backward on the CPU
    size = heads * WIDTH * q.element_size()
    yield from forward_and_backward(
        shapes,
        functions,
        (q, k, v),
        forward_bytes=(2 * rows + 2 * columns) * size,
        backward_bytes=(3 * rows + 4 * columns) * size,
        forward_only=tuple(forward_only),
    )
    yield mask_case(setting, op, layout, slots, shapes)


def mask_case(setting: Setting, op: Op, layout: PatchLayout, slots: int, shapes: dict[str, Any]) -> Case:
    lengths = layout.lengths()
    variants: dict[str, Callable[[], Any]] = {
        "ours": lambda: PatchLayout.from_lengths(lengths, layout.num_bytes),
    }
    if layout.num_bytes <= FLEX_UP_TO[setting.device.type]:
        variants["flex"] = lambda: block_mask(op, layout, slots)
    if layout.num_bytes <= DENSE_UP_TO:
        variants["dense"] = lambda: dense_mask(op, layout, slots)
        if theirs := transformers_mask(op, layout, slots, setting.dtype):
            variants["transformers"] = theirs
    return Case("mask", shapes, variants, lengths.nbytes + 8 * layout.num_bytes + 4 * layout.capacity)
