"""Modules over the ops, with the parameters that published Byte Latent Transformers give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ._autograd import autocast_dtype
from ._checks import check_bool, check_int, check_ints, check_number, fail_value
from .layout import PatchLayout
from .ops.decoder_cross_attention import decoder_cross_attention
from .ops.encoder_cross_attention import encoder_cross_attention
from .ops.hash_ngram_embedding import HASH_PRIMES, MAX_TABLES, hash_ngram_embedding, keep_coalesced


def cast_once(x: torch.Tensor) -> torch.Tensor:
    """x as autocast would hand it to a linear layer.

    Where several layers read it, each would cast it again, and its gradient back, which takes a tenth of the training
    step of a small model.
    """
    dtype = autocast_dtype(x.device)
    return x.to(dtype) if x.dtype == torch.float32 and dtype is not None else x


class HashNgramEmbedding(nn.Embedding):
    """Adds to byte embeddings the table rows of the hashed n-grams that end at each byte.

    One table [num_rows, dim] for each hash function and size, all in one `weight`, function-major. It starts at zero,
    so that an n-gram never seen in training stays without effect. It is an `nn.Embedding` because that is how
    DistributedDataParallel knows which gradients are sparse.

    Args:
        num_rows, dim: shape of one table.
        ngram_sizes: sizes of the n-grams in bytes.
        num_functions: hash functions, 1 to 11; they take the first primes of `blt_kernels.HASH_PRIMES`.
        normalize, sparse_grad: see `blt_kernels.hash_ngram_embedding`.

    Raises:
        TypeError, ValueError: wrong argument.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        ngram_sizes: Sequence[int] = (3, 4, 5, 6, 7, 8),
        *,
        num_functions: int = 1,
        normalize: bool = False,
        sparse_grad: bool = False,
    ):
        op = "HashNgramEmbedding"
        check_int(op, "num_rows", num_rows, 1)
        check_int(op, "dim", dim, 1)
        check_ints(op, "ngram_sizes", ngram_sizes, 1)
        check_int(op, "num_functions", num_functions, 1, len(HASH_PRIMES))
        if num_functions * len(ngram_sizes) > MAX_TABLES:
            got = f"{num_functions} * {len(ngram_sizes)}"
            raise fail_value(op, "ngram_sizes", f"at most {MAX_TABLES} (times num_functions)", got)
        check_bool(op, "normalize", normalize)
        check_bool(op, "sparse_grad", sparse_grad)
        super().__init__(num_functions * len(ngram_sizes) * num_rows, dim, sparse=sparse_grad)
        self._follow_weight()
        self.num_rows = num_rows
        self.ngram_sizes = tuple(ngram_sizes)
        self.primes = HASH_PRIMES[:num_functions]
        self.normalize = normalize

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HashNgramEmbedding:
        super()._apply(fn, recurse)
        self._follow_weight()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._follow_weight()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_weight()

    def _follow_weight(self) -> None:
        """Keeps the sparse gradient coalesced, which compiled code cannot do.

        It is called wherever the module may have got another parameter: to_empty(), load_state_dict(assign=True), and
        copies of the module.
        """
        if self.sparse:
            keep_coalesced(self.weight)

    def forward(  # type: ignore[override]
        self, tokens: torch.Tensor, base: torch.Tensor | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """tokens [B, N], base [B, N, dim] or None -> [B, N, dim]."""
        return hash_ngram_embedding(
            tokens,
            self.weight,
            base=base,
            ngram_sizes=self.ngram_sizes,
            num_rows=self.num_rows,
            primes=self.primes,
            cu_seqlens=cu_seqlens,
            normalize=self.normalize,
            sparse_grad=self.sparse,
        )

    def extra_repr(self) -> str:
        rows, dim = self.weight.shape
        return f"{rows}, {dim}, num_rows={self.num_rows}, ngram_sizes={self.ngram_sizes}"


class _PatchCrossAttention(nn.Module):
    """Norms and projections of cross-attention between bytes and patch slots, all of width `dim`.

    Args:
        dim: a multiple of `num_heads`.
        window: patches that are seen, at least 1.
        eps: of the norms.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`; None: as many.

    Raises:
        TypeError, ValueError: wrong argument.
    """

    def __init__(
        self, dim: int, num_heads: int, *, window: int = 1, eps: float = 1e-5, num_kv_heads: int | None = None
    ):
        op = type(self).__name__
        check_int(op, "dim", dim, 1)
        check_int(op, "num_heads", num_heads, 1)
        check_int(op, "window", window, 1)
        check_number(op, "eps", eps, 0, above=True)
        if dim % num_heads:
            raise fail_value(op, "dim", f"a multiple of num_heads = {num_heads}", dim)
        kv_dim = dim
        if num_kv_heads is not None:
            check_int(op, "num_kv_heads", num_kv_heads, 1)
            if num_heads % num_kv_heads:
                raise fail_value(op, "num_kv_heads", f"a divisor of num_heads = {num_heads}", num_kv_heads)
            kv_dim = dim // num_heads * num_kv_heads
        super().__init__()
        self.head_dim = dim // num_heads
        self.window = window
        self.q_norm = nn.RMSNorm(dim, eps=eps)
        self.k_norm = nn.RMSNorm(dim, eps=eps)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def _qkv(self, queries: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        queries, context = self.q_norm(queries), cast_once(self.k_norm(context))
        heads = (-1, self.head_dim)
        return (
            self.q_proj(queries).unflatten(-1, heads),
            self.k_proj(context).unflatten(-1, heads),
            self.v_proj(context).unflatten(-1, heads),
        )


class EncoderCrossAttention(_PatchCrossAttention):
    """Patch slots read the bytes of their patch (with `window` w, of the last w patches)."""

    def forward(self, slots: torch.Tensor, x: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        """slots [B, C*K, dim], bytes x [B, N, dim] -> [B, C*K, dim], without a residual; empty patches give 0."""
        q, k, v = self._qkv(slots, x)
        return self.o_proj(encoder_cross_attention(q, k, v, layout, window=self.window).flatten(-2))


class DecoderCrossAttention(_PatchCrossAttention):
    """Bytes read the slots of the last finished patch (with `window` w, of the last w)."""

    def forward(self, x: torch.Tensor, slots: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        """bytes x [B, N, dim], slots [B, C*K, dim] -> [B, N, dim], without a residual; 0 where no patch is done."""
        q, k, v = self._qkv(x, slots)
        return self.o_proj(decoder_cross_attention(q, k, v, layout, window=self.window).flatten(-2))
