"""hash_ngram_embedding against F.embedding_bag and F.embedding, which are given the ids that ours has to hash.

"uniform" tokens give every position rows of its own; "text" is Python's own standard library, whose n-grams repeat.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Case, main
from torch import Tensor

from blt_kernels import hash_ngram_embedding, hash_ngram_ids

SIZES = (3, 4, 5, 6, 7, 8)
G = len(SIZES)
SHAPES = [  # N, D, rows of each table: tables exceed every cache, the largest first so that malloc can reuse its room
    (8192, 768, 100_000),
    (16384, 1024, 50_000),
    (4096, 1024, 50_000),
    (4096, 768, 5_000),
]


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


def text_tokens(count: int) -> Tensor:
    data = bytearray()
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        data += path.read_bytes()
        if len(data) >= count:
            break
    return torch.tensor(list(data[:count]))[None] + 4


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for num_bytes, width, num_rows in SHAPES:
        yield from cases_of("uniform", torch.randint(0, 2**31, (1, num_bytes)), width, num_rows)
        yield from cases_of("text", text_tokens(num_bytes), width, num_rows)


def cases_of(kind: str, tokens: Tensor, width: int, num_rows: int) -> Iterator[Case]:
    num_bytes = tokens.shape[1]
    table = torch.randn(1000, width).repeat(G * num_rows // 1000, 1).requires_grad_()
    ids = (hash_ngram_ids(tokens, SIZES, num_rows) + num_rows * torch.arange(G))[0]
    unique = ids.unique().numel()
    grad = torch.randn(num_bytes, width)

    def ours(table: Tensor, ids: Tensor, base: Tensor | None, sparse: bool = False) -> Tensor:
        base = None if base is None else base[None]
        return hash_ngram_embedding(tokens, table, base=base, ngram_sizes=SIZES, num_rows=num_rows, sparse_grad=sparse)[
            0
        ]

    functions: dict[str, Callable[..., Tensor]] = {
        "ours": ours,
        "embedding_bag": bag,
        "embedding_bag compiled": torch.compile(bag, dynamic=False),
        "6 embeddings": embeddings,
        "6 embeddings compiled": torch.compile(embeddings, dynamic=False),
    }

    def forward(fn: Callable, base: Tensor | None) -> Tensor:
        with torch.no_grad():
            return fn(table, ids, base)

    def both(fn: Callable, sparse: bool) -> Tensor:
        (gradient,) = torch.autograd.grad(fn(table, ids, None, sparse), table, grad)
        return gradient.coalesce() if sparse else gradient

    def check(variants: dict[str, Callable]) -> None:
        ours, *others = variants.values()
        first = ours()
        for other in others:
            result = other()
            if first.is_sparse:
                assert torch.equal(first.indices(), result.indices())
                torch.testing.assert_close(first.values(), result.values(), rtol=1e-4, atol=1e-3)
            else:
                read = ids.flatten() if len(result) == len(table) else slice(None)  # few of a dense gradient's rows
                torch.testing.assert_close(first[read], result[read], rtol=1e-4, atol=1e-3)

    row = width * table.element_size()
    shapes = {"N": num_bytes, "D": width, "V": num_rows, "G": G, "unique": unique}
    for name, call, argument, rows in (
        ("forward", forward, None, num_bytes * (G + 1)),
        ("forward with base", forward, torch.randn(num_bytes, width), num_bytes * (G + 2)),
        ("both, sparse gradient", both, True, num_bytes * (G + 1) + num_bytes * G + unique),
        ("both, dense gradient", both, False, num_bytes * (G + 1) + num_bytes * G + len(table)),
    ):
        if name == "both, dense gradient" and len(table) * row > 2**28:
            continue  # mostly zeros, in every variant
        variants = {variant: partial(call, fn, argument) for variant, fn in functions.items()}
        if argument is True:
            del variants["6 embeddings compiled"]  # inductor cannot add sparse tensors
        yield Case(f"{name}, {kind}", shapes, variants, rows * row, partial(check, variants))


if __name__ == "__main__":
    main("hash_ngram_embedding", cases)
