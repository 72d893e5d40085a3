"""The transforms of torch.func over every differentiable op: they work, or say in our words what to do instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import lengths_of, make_layout

import blt_kernels as bk

LAYOUT = make_layout(lengths_of("typical"))
B, N, C = LAYOUT.offsets.shape[0], LAYOUT.num_bytes, LAYOUT.capacity
TOKENS = torch.arange(B * N).view(B, N) % 260
HASH = {"ngram_sizes": (2, 3), "num_rows": 7}


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


HEAD, TABLE, BYTES = rand(9, 4), rand(14, 4), rand(B, N, 4)
BYTE_HEADS, SLOT_HEADS = rand(B, N, 2, 4), rand(B, 2 * C, 2, 4)

# name -> (the op as a function of one differentiable argument, that argument)
CASES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "entropy": (bk.entropy, rand(B, N, 9)),
    "linear_entropy hidden": (lambda x: bk.linear_entropy(x, HEAD), rand(B, N, 4)),
    "linear_entropy weight": (lambda x: bk.linear_entropy(BYTES, x), rand(9, 4)),
    "segment_logits": (lambda x: bk.segment_logits(x, 1.0)[0], rand(B, N, 9)),
    "patch_pool": (lambda x: bk.patch_pool(x, LAYOUT, "mean"), rand(B, N, 4)),
    "patch_gather": (lambda x: bk.patch_gather(x, LAYOUT), rand(B, C, 4)),
    "encoder_cross_attention": (
        lambda x: bk.encoder_cross_attention(SLOT_HEADS, x, BYTE_HEADS, LAYOUT),
        rand(B, N, 2, 4),
    ),
    "decoder_cross_attention": (
        lambda x: bk.decoder_cross_attention(x, SLOT_HEADS, SLOT_HEADS, LAYOUT),
        rand(B, N, 2, 4),
    ),
    "hash_ngram_embedding table": (lambda x: bk.hash_ngram_embedding(TOKENS, x, **HASH), rand(14, 4)),
    "hash_ngram_embedding base": (
        lambda x: bk.hash_ngram_embedding(TOKENS, TABLE, base=x, **HASH),
        rand(B, N, 4),
    ),
    "hash_ngram_embedding_row_grad": (
        lambda x: bk.hash_ngram_embedding_row_grad(x, TOKENS, **HASH)[1],
        rand(B, N, 4),
    ),
    "pack": (lambda x: LAYOUT.pack(x, total=B * C), rand(B, C, 4)),
    "unpack": (LAYOUT.unpack, rand(1, B * C, 4)),
}
NAMES = pytest.mark.parametrize("name", CASES)
# All but those that are made of PyTorch's own operators, which torch.func can transform.
OPS = pytest.mark.parametrize("name", [name for name in CASES if name not in ("pack", "unpack")])


def scalar(name: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    op, x = CASES[name]
    return lambda x: op(x).square().sum(), x


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "grad inside vmap": lambda f, x: torch.func.vmap(torch.func.grad(f))(x[None])[0],
    "vmap inside grad": lambda f, x: torch.func.grad(lambda y: torch.func.vmap(f)(y).sum())(x[None])[0],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@OPS
def test_differentiation_is_explained(name: str, transform: str) -> None:
    f, x = scalar(name)
    words = rf"blt_kernels.{name.split()[0]} cannot be differentiated by torch.func .*use_backend\('reference'\)"
    with pytest.raises(NotImplementedError, match=words):
        TRANSFORMS[transform](f, x)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev"])
@NAMES
def test_the_remedy_works(name: str, transform: str) -> None:
    f, x = scalar(name)
    with bk.use_backend("reference"):
        y = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(f(y), y)
        torch.testing.assert_close(TRANSFORMS[transform](f, x), expected)


@OPS
def test_jvp_is_explained(name: str) -> None:
    f, x = scalar(name)
    with pytest.raises(NotImplementedError, match=f"blt_kernels.{name.split()[0]} has no forward-mode derivative"):
        torch.func.jvp(f, (x,), (x,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@NAMES
def test_vmap_and_functionalize_work(name: str) -> None:
    op, x = CASES[name]
    expected = torch.stack([op(x), op(2 * x)])
    torch.testing.assert_close(torch.func.vmap(op)(torch.stack([x, 2 * x])), expected)
    if name not in ("pack", "unpack"):  # torch.func.functionalize knows no torch.autograd.Function
        torch.testing.assert_close(torch.func.functionalize(op)(x), expected[0])


@NAMES
def test_constants_inside_a_transform_are_no_error(name: str) -> None:
    """A transform that does not differentiate by the op's inputs leaves it alone."""
    op, x = CASES[name]
    scale = torch.tensor(3.0, dtype=x.dtype)
    torch.testing.assert_close(torch.func.grad(lambda s: (s * op(x)).sum())(scale), op(x).sum())
