"""hash_ngram_ids and hash_ngram_embedding: the n-grams that end at each byte, as hashes and as a sum of table rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._autograd import register_derivative, register_no_double_backward
from .._checks import (
    FLOAT_DTYPES,
    INT64_MAX,
    INT_DTYPES,
    check_bool,
    check_device,
    check_int,
    check_ints,
    check_sequences,
    check_shape,
    check_tensor,
    describe,
    fail_type,
    fail_value,
)
from ..backend import backend_for
from ..reference.hash_ngram_embedding import HASH_PRIMES
from ._sparse_gradient import count_lookup, keep_coalesced, sparse_grad_of_table

_OP = "hash_ngram_embedding"
MAX_TABLES = 1024  # This is kMaxTables of csrc/cpu/hash_ngram_embedding.h.


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
    if backend_for(op, tokens.device) == "reference":
        return reference.hash_ngram_ids(tokens, ngram_sizes, num_rows, primes=primes, cu_seqlens=cu_seqlens)
    return torch.ops.blt_kernels.hash_ngram_ids(tokens, ngram_sizes, num_rows, primes, cu_seqlens)


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
            `.coalesce()`: memory and time follow the bytes, not the table. On CUDA its backward waits for the device
            once: the gradient's size is the number of rows that were read. `hash_ngram_embedding_row_grad` does not.
            Under torch.compile the gradient is sparse as well, unless the table is no leaf or one graph looks it up
            twice: then it is dense. Other uses of such a table in the same graph, such as a penalty on its values, are
            an error in backward.

    Returns:
        [B, N, D] in the dtype of `base`, without base in that of `table`.

    Raises:
        TypeError, ValueError: wrong argument. RuntimeError: decreasing or exceeding cu_seqlens (CPU).

    Source: Byte Latent Transformer, section 3.2.1, equation 2.
    """
    op = _OP
    ngram_sizes, num_rows, primes = _check_hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens)
    check_bool(op, "normalize", normalize)
    check_bool(op, "sparse_grad", sparse_grad)
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
            expected = f"a dtype that goes with a {describe([table.dtype])} table"
            raise fail_type(op, "base", expected, describe([base.dtype]))
    if sparse_grad and torch.compiler.is_compiling():
        sparse_grad = table.is_leaf
    elif sparse_grad:
        keep_coalesced(table)
    if backend_for(op, tokens.device, table, base) == "reference":
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
    return _embedding(tokens, table, base, ngram_sizes, num_rows, primes, cu_seqlens, normalize, sparse_grad)


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
    """The row-sparse gradient of the table of `hash_ngram_embedding`, in shapes that do not depend on the tokens.

    For training steps that must not wait for the device or change shapes: CUDA graphs, `torch.compile` without dynamic
    sizes. Give `hash_ngram_embedding` a detached table, and this function the gradient of its result. Then

        table.index_add_(0, rows, values, alpha=-learning_rate)

    is a step of gradient descent: padding is in bounds and adds zeros. An optimiser that writes rows instead of adding
    to them, or changes them where the gradient is 0, must leave out entries from `count` on.

    Args:
        grad: [B, N, D] float: gradient of what `hash_ngram_embedding` returned.
        tokens, ngram_sizes, num_rows, primes, cu_seqlens, normalize: those of the call of `hash_ngram_embedding`.
        table_dtype: dtype of the table; by default that of `grad`. float64 goes with float64 only.

    Returns:
        rows: int64 [B*N*G]: the rows of the table that were read, ascending, each once; from entry `count` on the last
            of them, again and again.
        values: [B*N*G, D] in `table_dtype`: their gradients; from entry `count` on zeros.
        count: int64 []: how many rows were read.

        Entries up to `count` are the indices and values of the sparse gradient that `sparse_grad=True` gives.

    Raises:
        TypeError, ValueError: wrong argument. RuntimeError: decreasing or exceeding cu_seqlens (CPU).

    Source: Byte Latent Transformer, section 3.2.1, equation 2.
    """
    op = "hash_ngram_embedding_row_grad"
    ngram_sizes, num_rows, primes = _check_hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens)
    check_bool(op, "normalize", normalize)
    check_tensor(op, "grad", grad, ndim=3, dtypes=FLOAT_DTYPES)
    check_device(op, "grad", grad, tokens.device, "tokens")
    check_shape(op, "grad", grad, (*tokens.shape, None))
    table_dtype = grad.dtype if table_dtype is None else table_dtype
    if table_dtype not in FLOAT_DTYPES:
        raise fail_type(op, "table_dtype", describe(FLOAT_DTYPES), str(table_dtype).removeprefix("torch."))
    if (grad.dtype == torch.float64) != (table_dtype == torch.float64):
        expected = f"a dtype that goes with a {describe([table_dtype])} table"
        raise fail_type(op, "grad", expected, describe([grad.dtype]))
    if backend_for(op, tokens.device, grad) == "reference":
        return reference.hash_ngram_embedding_row_grad(
            grad,
            tokens,
            ngram_sizes=ngram_sizes,
            num_rows=num_rows,
            primes=primes,
            cu_seqlens=cu_seqlens,
            normalize=normalize,
            table_dtype=table_dtype,
        )
    return _row_grad(grad, tokens, ngram_sizes, num_rows, primes, cu_seqlens, normalize, table_dtype)


def _check_hash(
    op: str, tokens: Any, ngram_sizes: Any, num_rows: Any, primes: Any, cu_seqlens: Any
) -> tuple[list[int], int, list[int]]:
    check_tensor(op, "tokens", tokens, ndim=2, dtypes=INT_DTYPES)
    check_int(op, "num_rows", num_rows, 1, INT64_MAX)
    check_ints(op, "ngram_sizes", ngram_sizes, 1, INT64_MAX)
    check_ints(op, "primes", primes, -INT64_MAX, INT64_MAX)
    if len(primes) * len(ngram_sizes) > MAX_TABLES:
        got = f"{len(primes)} * {len(ngram_sizes)}"
        raise fail_value(op, "ngram_sizes", f"at most {MAX_TABLES} (times primes)", got)
    check_sequences(op, tokens.shape[0], tokens.device, "tokens", None, cu_seqlens, tokens.shape[1])
    return list(ngram_sizes), num_rows, list(primes)


@torch.library.register_fake("blt_kernels::hash_ngram_ids")
def _ids_fake(tokens, ngram_sizes, num_rows, primes, cu_seqlens):
    return tokens.new_empty((*tokens.shape, len(primes) * len(ngram_sizes)), dtype=torch.int64)


@torch.library.register_fake("blt_kernels::hash_ngram_embedding")
def _fake(tokens, table, base, ngram_sizes, num_rows, primes, cu_seqlens, normalize, sparse_grad):
    return table.new_empty((*tokens.shape, table.shape[1]), dtype=None if base is None else base.dtype)


@torch.library.register_fake("blt_kernels::hash_ngram_embedding_backward")
def _backward_fake(grad, tokens, ngram_sizes, num_rows, primes, cu_seqlens, normalize, table_dtype):
    return grad.new_empty((len(primes) * len(ngram_sizes) * num_rows, grad.shape[2]), dtype=table_dtype)


@torch.library.register_fake("blt_kernels::hash_ngram_embedding_sparse_backward")
def _sparse_backward_fake(grad, tokens, ngram_sizes, num_rows, primes, cu_seqlens, normalize, table_dtype):
    rows = torch.library.get_ctx().new_dynamic_size()
    return tokens.new_empty(rows, dtype=torch.int64), grad.new_empty((rows, grad.shape[2]), dtype=table_dtype)


@torch.library.register_fake("blt_kernels::hash_ngram_embedding_row_grad")
def _row_grad_fake(grad, tokens, ngram_sizes, num_rows, primes, cu_seqlens, normalize, table_dtype):
    entries = tokens.numel() * len(primes) * len(ngram_sizes)
    return (
        tokens.new_empty(entries, dtype=torch.int64),
        grad.new_empty((entries, grad.shape[2]), dtype=table_dtype),
        tokens.new_empty((), dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, table, _, *hash_args, cu_seqlens, normalize, sparse_grad = inputs
    ctx.save_for_backward(tokens, cu_seqlens)  # the ids are hashed again: cheaper than G int64 a byte
    ctx.hash_args, ctx.normalize = hash_args, normalize
    ctx.can_be_sparse = count_lookup(table) if sparse_grad else lambda: False
    ctx.table_dtype = table.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    grad_table = grad_base = None
    if ctx.needs_input_grad[1]:
        tokens, cu_seqlens = ctx.saved_tensors
        args = (grad, tokens, *ctx.hash_args, cu_seqlens, ctx.normalize, ctx.table_dtype)
        backward = sparse_grad_of_table if ctx.can_be_sparse() else _embedding_backward
        grad_table = backward(*args)
    if ctx.needs_input_grad[2]:
        num_sizes = len(ctx.hash_args[0])
        grad_base = grad / (num_sizes + 1) if ctx.normalize else grad
    return None, grad_table, grad_base, *[None] * 6


_embedding = register_derivative(_OP, _backward, _setup_context)
_embedding_backward = register_no_double_backward(_OP)
register_no_double_backward(_OP, "hash_ngram_embedding_sparse_backward")
_row_grad = register_no_double_backward(_OP, "hash_ngram_embedding_row_grad")
