"""hash_ngram_ids and hash_ngram_embedding: what the bytes before a byte were, as a sum of table rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._checks import (
    FLOAT_DTYPES,
    INT_DTYPES,
    check_device,
    check_shape,
    check_tensor,
    fail_type,
    fail_value,
)
from ..reference.hash_ngram_embedding import HASH_PRIMES


def hash_ngram_ids(
    tokens: Tensor,
    ngram_sizes: Sequence[int],
    num_rows: int,
    *,
    primes: Sequence[int] = HASH_PRIMES[:1],
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Rolling polynomial hashes of the n-grams that end at each byte, reduced to table rows.

    The hash of size g at position j is `sum_i x[j-g+1+i] * prime**i` for i in 0 .. g-1, in wrapping int64, floor-mod
    `num_rows`. Tokens before the start of a row (with `cu_seqlens`: of a sequence) count as 0.

    Args:
        tokens: [B, N] int32 or int64, any values.
        ngram_sizes: lengths g of the n-grams in bytes, each at least 1, in any order.
        num_rows: rows of each table.
        primes: one multiplier for each hash function; `HASH_PRIMES` are the published ones.
        cu_seqlens: [S+1] int32 or int64, B = 1: byte offsets of packed sequences, from 0. Bytes after the last offset
            hash as one more sequence.

    Returns:
        int64 [B, N, G], G = len(primes) * len(ngram_sizes), prime-major; values in 0 .. num_rows-1, without the
        offset of the table.

    Raises:
        TypeError, ValueError: wrong argument. RuntimeError: decreasing or exceeding cu_seqlens (CPU).

    Source: Byte Latent Transformer, section 3.2.1, equations 3 and 4.
    """
    op = "hash_ngram_ids"
    ngram_sizes, num_rows, primes = _check_hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens)
    return reference.hash_ngram_ids(tokens, ngram_sizes, num_rows, primes=primes, cu_seqlens=cu_seqlens)


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
    """Adds to each byte's embedding one table row for each n-gram that ends at it: `base + sum_g table_g[id_g]`.

    The ids are those of `hash_ngram_ids`; they are never stored, in forward or backward. Sums are fp32 (fp64 in
    fp64). The table is read in place, neither copied nor cast, under autocast too.

    Args:
        tokens: [B, N] int32 or int64, any values.
        table: [G*num_rows, D] float, G = len(primes) * len(ngram_sizes): the tables of all hashes, prime-major, one
            after the other. Rows may have any stride; elements within a row must be adjacent.
        base: [B, N, D] float: usually the byte embeddings. It gives the output dtype, which may differ from the
            table's (fp32 table, bf16 base); float64 goes with float64 only.
        ngram_sizes, num_rows, primes, cu_seqlens: see `hash_ngram_ids`.
        normalize: divide the sum, base included, by len(ngram_sizes) + 1 (the paper's normalisation; literally so
            with several primes too). The published code does not.
        sparse_grad: give `table` a coalesced sparse gradient, as torch.nn.Embedding(sparse=True) would after
            `.coalesce()`: memory and time follow the bytes, not the table.

    Returns:
        [B, N, D] in the dtype of `base`, without base in that of `table`.

    Raises:
        TypeError, ValueError: wrong argument. RuntimeError: decreasing or exceeding cu_seqlens (CPU).

    Source: Byte Latent Transformer, section 3.2.1, equation 2.
    """
    op = "hash_ngram_embedding"
    ngram_sizes, num_rows, primes = _check_hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens)
    check_tensor(op, "table", table, ndim=2, dtypes=FLOAT_DTYPES)
    check_device(op, "table", table, tokens.device, "tokens")
    check_shape(op, "table", table, (len(primes) * len(ngram_sizes) * num_rows, None))
    if table.stride(1) != 1 and table.shape[1] > 1:
        raise fail_value(op, "table", "rows of adjacent elements (a copy would double its memory)", table.stride())
    if base is not None:
        check_tensor(op, "base", base, ndim=3, dtypes=FLOAT_DTYPES)
        check_device(op, "base", base, tokens.device, "tokens")
        check_shape(op, "base", base, (*tokens.shape, table.shape[1]))
        if (base.dtype == torch.float64) != (table.dtype == torch.float64):
            raise fail_type(op, "base", f"a dtype that goes with a {table.dtype} table", base.dtype)
    return reference.hash_ngram_embedding(
        tokens,
        table,
        base=base,
        ngram_sizes=ngram_sizes,
        num_rows=num_rows,
        primes=primes,
        cu_seqlens=cu_seqlens,
        normalize=normalize,
        sparse_grad=sparse_grad,
    )


def _check_hash(
    op: str, tokens: Any, ngram_sizes: Any, num_rows: Any, primes: Any, cu_seqlens: Any
) -> tuple[list[int], int, list[int]]:
    check_tensor(op, "tokens", tokens, ndim=2, dtypes=INT_DTYPES)
    ngram_sizes = _check_ints(op, "ngram_sizes", ngram_sizes, minimum=1)
    primes = _check_ints(op, "primes", primes, minimum=-(2**63))
    (num_rows,) = _check_ints(op, "num_rows", [num_rows], minimum=1)
    if cu_seqlens is not None:
        check_tensor(op, "cu_seqlens", cu_seqlens, ndim=1, dtypes=INT_DTYPES)
        check_device(op, "cu_seqlens", cu_seqlens, tokens.device, "tokens")
        if tokens.shape[0] != 1:
            raise fail_value(op, "cu_seqlens", "tokens of one row (B = 1)", f"tokens of shape {tuple(tokens.shape)}")
        if cu_seqlens.shape[0] == 0:
            raise fail_value(op, "cu_seqlens", "at least one offset", "none")
    return ngram_sizes, num_rows, primes


def _check_ints(op: str, argument: str, values: Any, minimum: int) -> list[int]:
    if not isinstance(values, Sequence) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise fail_type(op, argument, "integers", repr(values))
    if not values or not all(minimum <= v < 2**63 for v in values):
        raise fail_value(op, argument, f"at least one integer, each at least {minimum} and below 2**63", repr(values))
    return list(values)
