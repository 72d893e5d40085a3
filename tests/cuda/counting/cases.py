"""The ops at their central shapes, with the bytes that each must move.

A row of 1152 bytes in patches of 4.3 on average, width 768, 12 heads of 64, 6 n-gram sizes. Values come from a formula,
so that every machine and every torch counts the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from blt_kernels import PatchLayout, hash_ngram_ids

BYTES, WIDTH, HEADS, HEAD_WIDTH = 1152, 768, 12, 64
VOCABULARY, OTHER_VOCABULARIES = 260, (256, 512)
DTYPES = (torch.bfloat16, torch.float32)
CPU = torch.ops.blt_kernels  # makes what an op takes that is another op's result
NGRAM_SIZES, TABLE_ROWS, PRIMES = [3, 4, 5, 6, 7, 8], 1009, [1000000007]


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at a shape.

    Attributes:
        op: its name, such as "decoder_cross_attention".
        shape: what tells its cases apart, such as "K = 2, backward".
        moves: what must move, in words.
        moved: and in bytes: what is read and what is written, each once.
        call: runs the op.
        dtype: of the values.
    """

    op: str
    shape: str
    moves: str
    moved: int
    call: Callable[[], Any]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Such as "decoder_cross_attention, K = 2, backward, bfloat16"."""
        return ", ".join(part for part in (self.op, self.shape, str(self.dtype).removeprefix("torch.")) if part)


def values(*shape: int, dtype: torch.dtype = torch.float32, salt: int = 0) -> torch.Tensor:
    """Numbers between -2 and 2 that do not repeat."""
    i = torch.arange(torch.Size(shape).numel()) + 7919 * (salt + 1)
    return ((i * 2654435761 % 4294967291 % 65521).double() / 65521 * 4 - 2).view(shape).to(dtype)


def layout_of_central_row() -> PatchLayout:
    """Patches of 1 to 8 bytes, 4.3 on average, that fill a row of `BYTES`."""
    lengths: list[int] = []
    while (left := BYTES - sum(lengths)) > 0:
        lengths.append(min(left, (1, 5, 3, 8, 4, 2, 7, 4, 5, 4)[len(lengths) * 7 % 10]))
    return PatchLayout.from_lengths(torch.tensor([lengths]), BYTES)


def size(*tensors: torch.Tensor | None) -> int:
    """Bytes of these tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def cases(ops: Any) -> Iterator[Case]:
    """All cases; `ops` is the namespace of the ops."""
    layout = layout_of_central_row()
    for dtype in DTYPES:
        yield from _entropy(ops, dtype)
        yield from _patches(ops, layout, dtype)
        for rows in (2, 4):
            yield from _attention(ops, layout, rows, dtype)
        yield from _hash(ops, dtype)
    yield from _linear_entropy(ops)
    yield from _layouts(ops, layout)


def _entropy(ops: Any, dtype: torch.dtype) -> Iterator[Case]:
    grad = values(BYTES)
    for vocabulary in (VOCABULARY, *OTHER_VOCABULARIES):
        x, shape = values(BYTES, vocabulary, dtype=dtype), f"V = {vocabulary}"
        yield Case("entropy", shape, "logits, entropies", size(x, grad), partial(ops.entropy, x), dtype)
        moved, call = size(x, x, grad), partial(ops.entropy_backward, grad, x)
        yield Case("entropy", f"{shape}, backward", "logits, their gradient, grad", moved, call, dtype)
    x, options = values(1, BYTES, VOCABULARY, dtype=dtype), (4.0, "threshold", None, None, None, None, True, BYTES)
    moved, call = size(x, *CPU.segment_logits(x, *options)), partial(ops.segment_logits, x, *options)
    yield Case("segment_logits", f"V = {VOCABULARY}", "logits, entropies, layout", moved, call, dtype)


def _linear_entropy(ops: Any) -> Iterator[Case]:
    """The product is the library's; our kernels see logits in fp32, whatever the dtype of the inputs."""
    hidden, weight, grad = values(BYTES, WIDTH), values(VOCABULARY, WIDTH, salt=1), values(BYTES)
    op, kind, logits = "linear_entropy", torch.float32, 4 * BYTES * VOCABULARY
    moved, call = logits + size(grad), partial(ops.linear_entropy, hidden, weight)
    yield Case(op, "without the product", "logits of a chunk (caches), entropies", moved, call, kind)
    moved, call = 2 * logits + size(grad), partial(ops.linear_entropy_backward, grad, hidden, weight, True, True)
    moves = "logits and gradient of a chunk (caches), grad"
    yield Case(op, "without the product, backward", moves, moved, call, kind)


def _patches(ops: Any, layout: PatchLayout, dtype: torch.dtype) -> Iterator[Case]:
    x, y = values(1, BYTES, WIDTH, dtype=dtype), values(1, layout.capacity, WIDTH, dtype=dtype, salt=1)
    offsets, ids = layout.offsets, layout.visible_ids
    largest = CPU.patch_pool(x, offsets, "max")
    for reduce, inputs, moves in (
        ("max", (x, largest), "x, out, grad, grad_x"),
        ("mean", (None, None), "grad, grad_x"),
    ):
        yield Case("patch_pool", reduce, "x, out", size(x, y), partial(ops.patch_pool, x, offsets, reduce), dtype)
        call = partial(ops.patch_pool_backward, y, offsets, *inputs, BYTES, reduce)
        yield Case("patch_pool", f"{reduce}, backward", moves, size(x, y, *inputs), call, dtype)
    moved = size(ids, y, x)
    yield Case("patch_gather", "", "ids, distinct rows of y, out", moved, partial(ops.patch_gather, y, ids), dtype)
    call = partial(ops.patch_gather_backward, x, ids, layout.capacity)
    yield Case("patch_gather", "backward", "ids, grad, grad_y", moved, call, dtype)


def _attention(ops: Any, layout: PatchLayout, rows: int, dtype: torch.dtype) -> Iterator[Case]:
    """`rows`: of a slot, K."""
    of_bytes, of_slots = (
        [values(1, n, HEADS, HEAD_WIDTH, dtype=dtype, salt=salt) for salt in range(3)]
        for n in (BYTES, rows * layout.capacity)
    )
    encoder = (of_slots, of_bytes, (layout.offsets, layout.cu_patches))
    decoder = (of_bytes, of_slots, (layout.visible_ids, layout.offsets, layout.cu_patches))
    for name, ((q, grad, _), (k, v, _), fields) in (("encoder", encoder), ("decoder", decoder)):
        op, shape, options = f"{name}_cross_attention", f"K = {rows}", (*fields, None, 1)
        out, lse = getattr(CPU, op)(q, k, v, *options)
        moved, call = size(q, k, v, out, lse), partial(getattr(ops, op), q, k, v, *options)
        yield Case(op, shape, "q, k, v, out, lse", moved, call, dtype)
        moved = size(q, k, v, grad, lse) + size(q, k, v)
        call = partial(getattr(ops, f"{op}_backward"), grad, q, k, v, lse, *options, True, True, True)
        yield Case(op, f"{shape}, backward", "q, k, v, grad, lse, three gradients", moved, call, dtype)


def _hash(ops: Any, dtype: torch.dtype) -> Iterator[Case]:
    op, tables = "hash_ngram_embedding", len(NGRAM_SIZES)
    tokens = (values(1, BYTES) * 1000).long() % 256 + 4
    ngrams = (NGRAM_SIZES, TABLE_ROWS, PRIMES, None)
    table, base = values(tables * TABLE_ROWS, WIDTH, dtype=dtype), values(1, BYTES, WIDTH, dtype=dtype, salt=1)
    call = partial(ops.hash_ngram_embedding, tokens, table, base, *ngrams, True, False)
    yield Case(op, "", "G table rows, base, out", (tables + 2) * size(base), call, dtype)
    ids = hash_ngram_ids(tokens, NGRAM_SIZES, TABLE_ROWS, primes=PRIMES)
    rows = sum(of_table.unique().numel() for of_table in ids.unbind(-1))
    moved = tables * size(base) + rows * WIDTH * base.element_size()
    call = partial(ops.hash_ngram_embedding_sparse_backward, base, tokens, *ngrams, True, dtype)
    yield Case(op, "sparse backward, without the sort", "G rows of grad, unique rows", moved, call, dtype)


def _layouts(ops: Any, layout: PatchLayout) -> Iterator[Case]:
    entropies, options = values(1, BYTES), (0.5, "threshold", None, None, None, None, True, None)
    ids = (layout.patch_ids, layout.visible_ids)
    every_slot = layout.offsets.element_size() * (BYTES + 1)  # without a capacity each byte has a slot
    call = partial(ops.segment, entropies, *options)
    yield Case("segment", "", "entropies, ids, offsets", size(entropies, *ids) + every_slot, call, torch.float32)
    lengths = layout.offsets.diff()
    call = partial(ops.layout_from_lengths, lengths, BYTES, None, None, None)
    moved = size(lengths, *ids, layout.offsets)
    yield Case("layout_from_lengths", "", "lengths, ids, offsets", moved, call, torch.int32)
