"""Hash n-gram embeddings by their definition: rolling polynomial hashes of the tokens, one table row a hash, summed.

Byte Latent Transformer (arXiv:2412.09871), section 3.2.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
    ids = hash_ngram_ids(tokens, ngram_sizes, num_rows, primes=primes, cu_seqlens=cu_seqlens)
    rows = ids + num_rows * torch.arange(ids.shape[-1], device=ids.device)  # table index g starts at row g * num_rows
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


class _CoalesceGradient(torch.autograd.Function):
    """The identity, with a coalesced sparse gradient."""

    @staticmethod
    def forward(ctx, table: Tensor) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.coalesce()
