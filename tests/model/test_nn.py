"""The modules over the ops: their parameters, and what they compute."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import lengths_of, make_layout

from blt_kernels import HASH_PRIMES, hash_ngram_embedding
from blt_kernels.nn import DecoderCrossAttention, EncoderCrossAttention, HashNgramEmbedding, cast_once
from blt_kernels.optim import clip_grad_norm


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_hash_embedding_is_the_op_over_its_weight(sparse_grad: bool) -> None:
    module = HashNgramEmbedding(11, 6, (2, 4), num_functions=3, normalize=True, sparse_grad=sparse_grad)
    assert module.weight.shape == (3 * 2 * 11, 6) and not module.weight.any()
    torch.nn.init.normal_(module.weight)
    tokens, base, cu_seqlens = torch.randint(0, 260, (1, 9)), torch.randn(1, 9, 6), torch.tensor([0, 4, 9])
    how = {"ngram_sizes": (2, 4), "num_rows": 11, "primes": HASH_PRIMES[:3], "normalize": True}
    expected = hash_ngram_embedding(tokens, module.weight, base=base, cu_seqlens=cu_seqlens, **how)
    torch.testing.assert_close(module(tokens, base, cu_seqlens=cu_seqlens), expected, rtol=0, atol=0)
    module(tokens).sum().backward()
    assert module.weight.grad.is_sparse == sparse_grad
    assert list(module.state_dict()) == ["weight"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_functions": 12}, ValueError, "num_functions: expected 1 .. 11, got 12"),
        ({"num_functions": 0}, ValueError, "num_functions: expected 1 .. 11, got 0"),
        ({"num_functions": 1.0}, TypeError, "num_functions: expected an int, got float"),
        ({"num_rows": 0}, ValueError, "num_rows: expected at least 1, got 0"),
        ({"dim": -1}, ValueError, "dim: expected at least 1, got -1"),
        ({"dim": "8"}, TypeError, "dim: expected an int, got str"),
        ({"ngram_sizes": ()}, ValueError, "ngram_sizes: expected at least one, got none"),
        ({"ngram_sizes": 3}, TypeError, "ngram_sizes: expected a sequence of ints, got int"),
        ({"ngram_sizes": (3, 0)}, ValueError, "ngram_sizes: expected at least 1, got 0"),
        ({"ngram_sizes": (3,) * 1025}, ValueError, "ngram_sizes: expected at most 1024"),
        ({"normalize": 1}, TypeError, "normalize: expected a bool, got int"),
        ({"sparse_grad": None}, TypeError, "sparse_grad: expected a bool, got NoneType"),
    ],
)
def test_hash_embedding_errors_name_the_argument(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match="HashNgramEmbedding: " + words):
        HashNgramEmbedding(**({"num_rows": 7, "dim": 4} | change))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_heads": 3}, ValueError, "dim: expected a multiple of num_heads = 3, got 8"),
        ({"num_heads": 0}, ValueError, "num_heads: expected at least 1, got 0"),
        ({"dim": 8.0}, TypeError, "dim: expected an int, got float"),
        ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
        ({"eps": 0.0}, ValueError, "eps: expected a finite number above 0, got 0.0"),
        ({"eps": "small"}, TypeError, "eps: expected a number, got str"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads: expected at least 1, got 0"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads: expected a divisor of num_heads = 2, got 3"),
    ],
)
@pytest.mark.parametrize("module", [EncoderCrossAttention, DecoderCrossAttention])
def test_cross_attention_errors_name_the_argument(module, change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"{module.__name__}: {words}"):
        module(**({"dim": 8, "num_heads": 2} | change))


def load(module: HashNgramEmbedding) -> HashNgramEmbedding:
    module.load_state_dict({"weight": torch.zeros_like(module.weight)}, assign=True)
    return module


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda m: m.double(), lambda m: m.to_empty(device="cpu"), load])
@pytest.mark.parametrize("compiled", [False, True])
def test_sparse_gradients_stay_coalesced_in_other_forms_of_the_module(remake, compiled: bool) -> None:
    module = remake(HashNgramEmbedding(7, 4, sparse_grad=True))
    forward = torch.compile(module, backend="aot_eager") if compiled else module
    forward(torch.randint(0, 260, (2, 9))).sum().backward()
    assert module.weight.grad.is_coalesced()


def naive(module, queries: torch.Tensor, context: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Dense attention under the mask seen [B, Lq, Lk]; a query that sees nothing gets 0."""
    queries, context = module.q_norm(queries), module.k_norm(context)
    q, k, v = (
        projection(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for projection, x in ((module.q_proj, queries), (module.k_proj, context), (module.v_proj, context))
    )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # a group shares its keys
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen[:, None], -torch.inf)
    y = scores.softmax(-1).nan_to_num(0.0) @ v
    return module.o_proj(y.transpose(1, 2).flatten(-2))


def randomise_norms(module) -> None:
    torch.nn.init.normal_(module.q_norm.weight)
    torch.nn.init.normal_(module.k_norm.weight)


@pytest.mark.parametrize(("window", "num_kv_heads"), [(1, None), (2, None), (1, 2), (2, 1)])
@pytest.mark.parametrize("case", ["typical", "unequal_rows", "trailing_empty"])
def test_cross_attention_equals_a_dense_mask(case: str, window: int, num_kv_heads: int | None) -> None:
    layout = make_layout(lengths_of(case))
    batch, num_bytes, slots_per_patch = layout.offsets.shape[0], layout.num_bytes, 3
    x = torch.randn(batch, num_bytes, 8, dtype=torch.float64)
    slots = torch.randn(batch, layout.capacity * slots_per_patch, 8, dtype=torch.float64)
    patch = torch.arange(layout.capacity).repeat_interleave(slots_per_patch)  # patch-major

    encoder = EncoderCrossAttention(8, 4, window=window, num_kv_heads=num_kv_heads).double()
    assert encoder.k_proj.weight.shape == encoder.v_proj.weight.shape == (2 * (num_kv_heads or 4), 8)
    randomise_norms(encoder)
    own, used = layout.patch_ids[:, None], (layout.lengths() > 0)[:, patch, None]
    seen = (own >= 0) & (own <= patch[:, None]) & (own > patch[:, None] - window) & used
    torch.testing.assert_close(encoder(slots, x, layout), naive(encoder, slots, x, seen))

    decoder = DecoderCrossAttention(8, 4, window=window, num_kv_heads=num_kv_heads).double()
    randomise_norms(decoder)
    visible = layout.visible_ids[..., None]
    seen = (patch <= visible) & (patch > visible - window) & (visible >= 0)
    torch.testing.assert_close(decoder(x, slots, layout), naive(decoder, x, slots, seen))


def test_cast_once_is_what_autocast_would_do() -> None:
    x, double = torch.randn(2, 3), torch.randn(2, 3, dtype=torch.float64)
    assert cast_once(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_once(x).dtype == torch.bfloat16
        assert cast_once(double) is double
        assert cast_once(x.to("meta")).dtype == torch.float32  # a device without autocast


def test_distributed_training_knows_that_table_gradients_are_sparse(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        module = HashNgramEmbedding(7, 4, (3, 4), sparse_grad=True)
        replica = torch.nn.parallel.DistributedDataParallel(module)
        replica(torch.randint(0, 260, (2, 9))).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert module.weight.grad.is_sparse and (module.weight.grad.to_dense().sum() > 0)


def test_clipping_takes_one_parameter_and_none_with_a_gradient() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    assert clip_grad_norm([parameter], 1.0) == 0
    parameter.grad = torch.full((4,), 3.0)
    assert clip_grad_norm(parameter, 1.0) == 6
    torch.testing.assert_close(parameter.grad.norm(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("parameters", "max_norm", "error", "words"),
    [
        ([], 0, ValueError, "max_norm: expected a finite number above 0, got 0"),
        ([], float("nan"), ValueError, "max_norm: expected a finite number above 0, got nan"),
        ([], "1", TypeError, "max_norm: expected a number, got str"),
        (["weight"], 1.0, TypeError, "parameters: expected tensors, got str"),
    ],
)
def test_clipping_errors_name_the_argument(parameters, max_norm, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match="clip_grad_norm: " + words):
        clip_grad_norm(parameters, max_norm)
