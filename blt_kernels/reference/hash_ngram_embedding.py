"""Hash n-gram embeddings by their definition: rolling polynomial hashes of the tokens, one table row a hash, summed.

Byte Latent Transformer (arXiv:2412.09871), section 3.2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_sequence_values

#: The multipliers of the published hash functions, in their order. Function f uses `HASH_PRIMES[f]`.
HASH_PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)


def hash_ngram_ids(
    tokens: Tensor,
    ngram_sizes: Sequence[int],
    num_rows: int,
    *,
    primes: Sequence[int] = HASH_PRIMES[:1],
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    check_sequence_values("hash_ngram_ids", tokens.shape[1], None, cu_seqlens)
    x = tokens.long()  # [B, N]
    position = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        start = torch.zeros_like(position)
    else:
        start = cu_seqlens.long()[torch.searchsorted(cu_seqlens.long(), position, right=True) - 1]
    ids = []
    for prime in primes:
        h = x  # H_1(j) = x[j];  H_{g+1}(j) = x[j-g] + prime * H_g(j), in wrapping int64
        hashes = [h]
        for g in range(1, max(ngram_sizes)):
            earlier = F.pad(x, (g, 0))[:, : x.shape[1]].masked_fill(position - g < start, 0)  # x[j-g]
            h = earlier + prime * h
            hashes.append(h)
        ids += [hashes[size - 1] % num_rows for size in ngram_sizes]  # floor-mod: never negative
    return torch.stack(ids, dim=-1)  # [B, N, G]


def hash_ngram_embedding(
    tokens: Tensor,
    table: Tensor,
    *,
    base: Tensor | None = None,
    ngram_sizes: Sequence[int],
    num_rows: int,
    primes: Sequence[int] = HASH_PRIMES[:1],
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
    sparse_grad: bool = False,
) -> Tensor:
    rows = _rows_read(tokens, ngram_sizes, num_rows, primes, cu_seqlens)
    dtype = table.dtype if base is None else base.dtype
    sum_dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    if sparse_grad:
        table = _CoalesceGradient.apply(table)
    out = F.embedding(rows, table, sparse=sparse_grad).to(sum_dtype).sum(dim=-2)
    if base is not None:
        out = base.to(sum_dtype) + out
    if normalize:
        out = out / (len(ngram_sizes) + 1)
    return out.to(dtype)


def _rows_read(
    tokens: Tensor, ngram_sizes: Sequence[int], num_rows: int, primes: Sequence[int], cu_seqlens: Tensor | None
) -> Tensor:
    ids = hash_ngram_ids(tokens, ngram_sizes, num_rows, primes=primes, cu_seqlens=cu_seqlens)
    return ids + num_rows * torch.arange(ids.shape[-1], device=ids.device)  # table index g starts at row g * num_rows


def hash_ngram_embedding_row_grad(
    grad: Tensor,
    tokens: Tensor,
    *,
    ngram_sizes: Sequence[int],
    num_rows: int,
    primes: Sequence[int] = HASH_PRIMES[:1],
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
    table_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    read = _rows_read(tokens, ngram_sizes, num_rows, primes, cu_seqlens)  # [B, N, G]
    tables = read.shape[-1]
    read, order = read.flatten().sort(stable=True)  # the byte order[i] // tables reads row read[i]
    first = torch.ones_like(read, dtype=torch.bool)
    first[1:] = read[1:] != read[:-1]
    run = first.cumsum(0) - 1  # read[i] is in this run of equal rows
    rows = read[-1:].repeat(read.shape[0]).scatter(0, run, read)
    dtype = grad.dtype if table_dtype is None else table_dtype
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    by_entry = grad.flatten(0, 1)[order // tables].to(sum_dtype)
    values = torch.zeros_like(by_entry).index_add(0, run, by_entry)
    if normalize:
        values = values / (len(ngram_sizes) + 1)
    return rows, values.to(dtype), first.sum()


class _CoalesceGradient(torch.autograd.Function):
    """The identity, with a coalesced sparse gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if grad.is_meta else grad.coalesce()  # torch cannot coalesce without values
