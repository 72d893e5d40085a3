"""The sparse gradient of a hash table: how it leaves a compiled graph, and how `table.grad` stays coalesced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._autograd import register_no_double_backward

_SPARSE_GRAD = "blt_kernels::hash_ngram_embedding_sparse_grad"

# Compiled code calls this op when it runs. The compiler sees neither the sparse tensor nor the number of its rows (it
# depends on the tokens), and only hands the result on.
torch.library.define(
    _SPARSE_GRAD,
    "(Tensor grad, Tensor tokens, int[] ngram_sizes, int num_rows, int[] primes, Tensor? cu_seqlens, bool normalize, "
    "ScalarType table_dtype) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


@torch.library.impl(_SPARSE_GRAD, "CompositeExplicitAutograd")
def _sparse_grad(
    grad: Tensor, tokens: Tensor, ngram_sizes: list[int], num_rows: int, primes: list[int], *others: Any
) -> Tensor:
    """The gradient of the table as a coalesced sparse tensor [G*num_rows, D]."""
    rows, values = torch.ops.blt_kernels.hash_ngram_embedding_sparse_backward(
        grad, tokens, ngram_sizes, num_rows, primes, *others
    )
    size = (len(primes) * len(ngram_sizes) * num_rows, grad.shape[2])
    return torch.sparse_coo_tensor(rows[None], values, size, is_coalesced=True, check_invariants=False)


@torch.library.register_fake(_SPARSE_GRAD)
def _sparse_grad_fake(*arguments: Any) -> Tensor:
    # Inductor asks each tensor of a graph for its storage, and a sparse tensor has none. A dense tensor stands for it
    # while the graph is compiled. Its strides are 0, which are the strides that a sparse tensor reports, so that the
    # checks of the compiled code hold. What computed with it inside the graph would raise an error at run time, because
    # there is no data to point to. So it must only be handed out, as the gradient of an input of the graph.
    grad, _, ngram_sizes, num_rows, primes, *_, table_dtype = arguments
    size = (len(primes) * len(ngram_sizes) * num_rows, grad.shape[2])
    return grad.new_empty((), dtype=table_dtype).expand(size)


sparse_grad_of_table = register_no_double_backward("hash_ngram_embedding", "hash_ngram_embedding_sparse_grad")


def count_lookup(table: Tensor) -> Callable[[], bool]:
    """Called for every lookup with a sparse gradient. Backward asks the result whether the gradient can be sparse.

    It always can in eager code. In compiled code it cannot if the graph looks the table up twice: the graph would have
    to add two sparse gradients.
    """
    if type(table) in (Tensor, nn.Parameter):
        return lambda: True
    # While a graph is traced, one object stands for the table in all its lookups. It is gone when the tracing ends.
    lookups = table.__dict__.setdefault("_hash_ngram_lookups", [])
    lookups.append(None)
    return lambda: len(lookups) == 1


def keep_coalesced(table: Tensor) -> None:
    """Lets `table.grad` say that it is coalesced, which autograd forgets when it stores a sparse gradient.

    torch.optim.SparseAdam would sort and copy the gradient again. `hash_ngram_embedding(sparse_grad=True)` calls this
    on leaf tables, except inside torch.compile: there call it once, beside the parameter's creation, as
    `blt_kernels.nn.HashNgramEmbedding` does. Calling it again does nothing. A gradient is marked only where autograd
    stored the very indices of one that came coalesced, and not a sum; that is known without a look at them, and so
    without waiting for the device.
    """
    if table.is_leaf and table.requires_grad:
        hooks = table._post_accumulate_grad_hooks or {}
        if not any(isinstance(getattr(hook, "__self__", None), _Coalesced) for hook in hooks.values()):
            coalesced = _Coalesced()
            table.register_hook(coalesced.arrives)
            table.register_post_accumulate_grad_hook(coalesced.is_stored)


class _Coalesced:
    """Follows a coalesced gradient of one table into `table.grad`: the hooks before and after it is accumulated."""

    def __init__(self) -> None:
        # The indices of the gradient that is on its way. While they are held, no other tensor can have their memory.
        self.indices: Tensor | None = None

    @torch.utils.hooks.unserializable_hook  # A table is saved without this hook, and without a warning about it.
    def arrives(self, grad: Tensor) -> None:
        self.indices = grad._indices() if grad.is_sparse and grad.is_coalesced() else None

    def is_stored(self, table: Tensor) -> None:
        grad, indices, self.indices = table.grad, self.indices, None
        if indices is not None and grad is not None and grad.is_sparse and grad._indices().is_set_to(indices):
            grad._coalesced_(True)
