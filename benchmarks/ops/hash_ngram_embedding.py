"""hash_ngram_embedding against its definition and Hugging Face's code, which hash as ours does, and against
F.embedding_bag and F.embedding, which are given the ids.

Bytes count a table row for every n-gram that reads it, repeated or not, and the gradient likewise, although caches save
some reads of repeated rows. "uniform" tokens give every position rows of its own; "text" is Python's own library,
whose n-grams repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels import hash_ngram_embedding, hash_ngram_ids, reference

from .cases import Case, Headline, Setting, assert_close, in_report
from .patches import text_tokens

SIZES = (3, 4, 5, 6, 7, 8)
G = len(SIZES)
# N, D, rows of each table: tables exceed every cache, the largest first so that malloc can reuse its room.
SHAPES = {
    "cpu": ((8192, 768, 100_000), (16384, 1024, 50_000), (4096, 1024, 50_000), (4096, 768, 5_000)),
    "cuda": ((131072, 1024, 500_000), (65536, 1024, 500_000), (16384, 1024, 500_000)),  # 6 GB of tables
    "tiny": ((512, 64, 1000),),
}
HEADLINE_SHAPE = {"cpu": (16384, 1024, 50_000), "cuda": (65536, 1024, 500_000), "tiny": (512, 64, 1000)}
HEADLINES: dict[str, Headline] = {"forward with base": "results", "forward and backward, sparse gradient": "top"}


def bag(table: Tensor, ids: Tensor, base: Tensor | None, sparse: bool = False) -> Tensor:
    out = F.embedding_bag(ids, table, mode="sum", sparse=sparse)
    return out if base is None else base + out


def embeddings(table: Tensor, ids: Tensor, base: Tensor | None, sparse: bool = False) -> Tensor:
    """What the published code does: one lookup a table, added in turn."""
    out = F.embedding(ids[:, 0], table, sparse=sparse)
    out = out if base is None else base + out
    for g in range(1, G):
        out = out + F.embedding(ids[:, g], table, sparse=sparse)
    return out


def transformers_forward(tokens: Tensor, table: Tensor, num_rows: int, base: Tensor) -> Callable[[], Tensor] | None:
    """compute_hash_embeddings of Hugging Face's model, the byte embeddings looked up already."""
    try:
        from transformers.models.blt.modeling_blt import compute_hash_embeddings
    except ImportError:
        return None
    encoder = SimpleNamespace(embed_tokens=lambda tokens: base[None].clone())  # which it adds to in place
    lookup = partial(F.embedding, weight=table)

    def forward() -> Tensor:
        with torch.no_grad():
            return compute_hash_embeddings(tokens, encoder, lookup, 1, list(SIZES), num_rows)[0]

    return forward


def cases(setting: Setting) -> Iterator[Case]:
    headline_shape = HEADLINE_SHAPE[setting.scale]
    for shape in (headline_shape,) if setting.quick else SHAPES[setting.scale]:
        num_bytes, width, num_rows = shape
        if not setting.quick:
            uniform = torch.randint(0, 2**31, (1, num_bytes))
            yield from cases_of(setting, "uniform", uniform, width, num_rows)
        text = cases_of(setting, "text", text_tokens(1, num_bytes), width, num_rows)
        if width == headline_shape[1]:
            yield from in_report(text, num_bytes, HEADLINES if shape == headline_shape else None)
        else:
            yield from text


def cases_of(setting: Setting, kind: str, tokens: Tensor, width: int, num_rows: int) -> Iterator[Case]:
    tokens = tokens.to(setting.device)
    num_bytes = tokens.shape[1]
    rows_of_table = G * num_rows
    table = setting.randn(1000, width).repeat(rows_of_table // 1000, 1).requires_grad_()
    offsets = num_rows * torch.arange(G, device=setting.device)
    ids = (hash_ngram_ids(tokens, SIZES, num_rows) + offsets)[0]
    unique = ids.unique().numel()
    grad, base = setting.randn(num_bytes, width), setting.randn(num_bytes, width)

    def ours(table: Tensor, ids: Tensor, base: Tensor | None, sparse: bool = False) -> Tensor:
        rows = None if base is None else base[None]
        return hash_ngram_embedding(tokens, table, base=rows, ngram_sizes=SIZES, num_rows=num_rows, sparse_grad=sparse)[
            0
        ]

    def definition(table: Tensor, ids: Tensor, base: Tensor | None, sparse: bool = False) -> Tensor:
        rows = None if base is None else base[None]
        return reference.hash_ngram_embedding(
            tokens, table, base=rows, ngram_sizes=SIZES, num_rows=num_rows, sparse_grad=sparse
        )[0]

    functions: dict[str, Callable[..., Tensor]] = {
        "ours": ours,
        "reference": definition,
        "embedding_bag": bag,
        "embedding_bag compiled": torch.compile(bag, dynamic=False),
        "6 embeddings": embeddings,
        "6 embeddings compiled": torch.compile(embeddings, dynamic=False),
    }

    def forward(fn: Callable[..., Tensor], base: Tensor | None) -> Tensor:
        with torch.no_grad():
            return fn(table, ids, base)

    def both(fn: Callable[..., Tensor], sparse: bool) -> Tensor:
        (gradient,) = torch.autograd.grad(fn(table, ids, None, sparse), table, grad)
        return gradient.coalesce() if sparse else gradient

    def check(variants: dict[str, Callable[[], Tensor]]) -> None:
        ours, *others = variants.values()
        first = ours()
        for other in others:
            result = other()
            if first.is_sparse:
                assert torch.equal(first.indices(), result.indices())
                assert_close(first.values(), result.values(), (table,))
            else:
                read = ids.flatten() if len(result) == len(table) else slice(None)  # few of a dense gradient's rows
                assert_close(first[read], result[read], (table,))

    row = width * table.element_size()
    shapes = {"N": num_bytes, "D": width, "V": num_rows, "G": G, "unique": unique, "tokens": kind}
    kinds: tuple[tuple[str, Callable[..., Tensor], Tensor | bool | None, int], ...] = (
        ("forward", forward, None, num_bytes * (G + 1)),
        ("forward with base", forward, base, num_bytes * (G + 2)),
        ("forward and backward, sparse gradient", both, True, num_bytes * (G + 1) + num_bytes * G + unique),
        ("forward and backward, dense gradient", both, False, num_bytes * (G + 1) + num_bytes * G + len(table)),
    )
    for name, call, argument, rows in kinds:
        if name == "forward and backward, dense gradient" and len(table) * row > 2**28:
            continue  # mostly zeros, in every variant
        variants: dict[str, Callable[[], Tensor]] = {
            variant: partial(call, fn, argument) for variant, fn in functions.items()
        }
        if argument is True:
            del variants["6 embeddings compiled"]  # inductor cannot add sparse tensors
        if argument is base and (theirs := transformers_forward(tokens, table, num_rows, base)):
            variants["transformers"] = theirs
        # Coalescing a sparse gradient waits for the device.
        yield Case(name, shapes, variants, rows * row, partial(check, variants), graph=argument is not True)
