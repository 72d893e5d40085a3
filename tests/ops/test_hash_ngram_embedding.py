"""hash_ngram_ids and hash_ngram_embedding: exact ids, sums and table gradients against the definition."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_as_accurate,
    assert_no_recompile,
    assert_same_for_any_threads,
    awkward_view,
    opcheck,
    run_with_capability,
)
from hypothesis import given
from hypothesis import strategies as st

import blt_kernels
from blt_kernels import (
    HASH_PRIMES,
    hash_ngram_embedding,
    hash_ngram_embedding_row_grad,
    hash_ngram_ids,
    keep_coalesced,
    reference,
    use_backend,
)
from blt_kernels.nn import HashNgramEmbedding

SIZES = (3, 4, 5, 6, 7, 8)
HELLO = torch.tensor([[1, *(byte + 4 for byte in b"Hello world"), 2]])
LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Table and base dtypes that go together.
DTYPE_PAIRS = [(torch.float64, None), (torch.float64, torch.float64)] + [
    (table, base) for table in LOW_DTYPES for base in (None, *LOW_DTYPES)
]


def text_tokens(batch: int, num_bytes: int, vocabulary: int = 5) -> torch.Tensor:
    """Few different bytes: n-grams repeat, as in text."""
    return torch.randint(4, 4 + vocabulary, (batch, num_bytes))


def make_inputs(
    tokens: torch.Tensor,
    width: int = 24,
    num_rows: int = 23,
    table_dtype: torch.dtype = torch.float32,
    base_dtype: torch.dtype | None = torch.float32,
    groups: int = len(SIZES),
) -> tuple[torch.Tensor, torch.Tensor | None]:
    table = torch.randn(groups * num_rows, width, dtype=torch.float64).to(table_dtype).requires_grad_()
    if base_dtype is None:
        return table, None
    return table, torch.randn(*tokens.shape, width, dtype=torch.float64).to(base_dtype).requires_grad_()


def python_ids(tokens: Sequence[int], sizes: Sequence[int], num_rows: int, primes: Sequence[int]) -> list[list[int]]:
    """The definition in Python's own integers."""

    def row(j: int, size: int, prime: int) -> int:
        window = [tokens[i] if i >= 0 else 0 for i in range(j - size + 1, j + 1)]
        h = sum(x * prime**i for i, x in enumerate(window))
        return ((h + 2**63) % 2**64 - 2**63) % num_rows  # wrapping int64, floor-mod

    return [[row(j, size, prime) for prime in primes for size in sizes] for j in range(len(tokens))]


# ---- ids -------------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_published_blt():
    published = [
        443987, 124875, 393970, 386145, 358223, 190185, 217383, 142034, 146186, 10172, 334275, 306354, 472814,
    ]  # fmt: skip
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            assert hash_ngram_ids(HELLO, (3,), 500002)[0, :, 0].tolist() == published
            assert hash_ngram_ids(HELLO.int(), SIZES, 500002)[0, :, 0].tolist() == published


@pytest.mark.parametrize("num_rows", [1, 2, 3, 64, 500002, 2**31 - 1, 2**31, 2**40 + 1, 2**62, 2**63 - 1])
def test_ids_are_exact_for_any_int64(num_rows):
    edges = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**32)]
    tokens = edges + torch.randint(-(2**63), 2**63 - 1, (40,)).tolist()
    primes = [HASH_PRIMES[0], HASH_PRIMES[6], 2**63 - 1, -3]
    sizes = [1, 2, 3, 8]
    ids = hash_ngram_ids(torch.tensor([tokens]), sizes, num_rows, primes=primes)
    assert ids[0].tolist() == python_ids(tokens, sizes, num_rows, primes)


def test_ids_are_exact_next_to_multiples_of_the_modulus():
    # With n-grams of size 1 the hash is the token itself.
    tokens, moduli = [], [3, 500002, 2**31 - 1, 3 * 2**40, 2**62 + 1]
    for modulus in moduli:
        multiples = [k * modulus for k in (1, 2, 2**62 // modulus, (2**63 - 1) // modulus)]
        tokens = [sign * m + d for m in multiples for d in (-1, 0, 1) for sign in (1, -1)]
        tokens = [t for t in tokens if -(2**63) <= t < 2**63]
        assert hash_ngram_ids(torch.tensor([tokens]), [1], modulus)[0, :, 0].tolist() == [t % modulus for t in tokens]


def test_ids_follow_the_order_of_sizes_and_primes():
    tokens, sizes, primes = text_tokens(2, 30, 260), [8, 1, 5, 5, 2], HASH_PRIMES[:3]
    ids = hash_ngram_ids(tokens, sizes, 1009, primes=primes)
    assert ids.shape == (2, 30, 15) and ids.dtype == torch.int64
    for f, prime in enumerate(primes):
        for s, size in enumerate(sizes):
            assert torch.equal(ids[..., f * 5 + s], hash_ngram_ids(tokens, [size], 1009, primes=[prime])[..., 0])


@pytest.mark.parametrize("tokens_dtype", [torch.int32, torch.int64])
def test_ids_equal_the_reference(tokens_dtype):
    tokens = text_tokens(3, 50, 260).to(tokens_dtype)
    assert torch.equal(
        hash_ngram_ids(tokens, SIZES, 977, primes=HASH_PRIMES),
        reference.hash_ngram_ids(tokens, SIZES, 977, primes=HASH_PRIMES),
    )


def test_ids_of_a_prefix_are_a_prefix_of_the_ids():
    tokens = text_tokens(2, 40, 260)
    ids = hash_ngram_ids(tokens, SIZES, 977)
    for n in (0, 1, 2, 7, 8, 39):
        assert torch.equal(hash_ngram_ids(tokens[:, :n], SIZES, 977), ids[:, :n])


def test_windows_before_the_start_count_zeros():
    tokens = text_tokens(1, 20, 260)
    padded = F.pad(tokens, (50, 0))
    assert torch.equal(hash_ngram_ids(padded, (1, 7, 40), 977)[:, 50:], hash_ngram_ids(tokens, (1, 7, 40), 977))


@given(lengths=st.lists(st.integers(0, 12), min_size=0, max_size=6), rest=st.integers(0, 5), repeats=st.integers(0, 2))
def test_packed_sequences_are_as_if_alone(lengths, rest, repeats):
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    cu_seqlens = torch.tensor(offsets + [offsets[-1]] * repeats, dtype=torch.int32)
    tokens = text_tokens(1, offsets[-1] + rest, 260)
    table, base = make_inputs(tokens)
    alone = [*tokens.split([*lengths, rest], dim=1)]  # what follows the last offset is one more sequence
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            ids = hash_ngram_ids(tokens, SIZES, 23, cu_seqlens=cu_seqlens)
            assert torch.equal(ids, torch.cat([hash_ngram_ids(t, SIZES, 23) for t in alone], dim=1))
    out = hash_ngram_embedding(tokens, table, base=base, ngram_sizes=SIZES, num_rows=23, cu_seqlens=cu_seqlens.long())
    rows = [
        hash_ngram_embedding(t, table, base=b, ngram_sizes=SIZES, num_rows=23)
        for t, b in zip(alone, base.split([*lengths, rest], dim=1), strict=True)
    ]
    assert torch.equal(out, torch.cat(rows, dim=1))


def test_long_ngrams_and_many_tables():
    tokens = text_tokens(2, 300, 260)
    sizes = [1, 299, 300, 301, 400]
    assert torch.equal(hash_ngram_ids(tokens, sizes, 977), reference.hash_ngram_ids(tokens, sizes, 977))
    (last,) = hash_ngram_ids(tokens[:1, :1], [2**62], 977).flatten().tolist()  # zeros, then x[0]: x[0] * p**(2**62 - 1)
    h = tokens[0, 0].item() * pow(HASH_PRIMES[0], 2**62 - 1, 2**64)
    assert last == ((h + 2**63) % 2**64 - 2**63) % 977
    sizes = list(range(1, 129))
    table = torch.randn(1024 * 3, 5, dtype=torch.float64)
    kwargs = {"ngram_sizes": sizes, "num_rows": 3, "primes": HASH_PRIMES[:8]}
    out = hash_ngram_embedding(tokens[:, :40], table, **kwargs)
    torch.testing.assert_close(out, reference.hash_ngram_embedding(tokens[:, :40], table, **kwargs))


# ---- the sum ---------------------------------------------------------------------------------------------------------


def run(fn, tokens, table, base, *, grad, sparse_grad=False, **kwargs):
    """Output, table gradient (dense) and base gradient."""
    kwargs = {"ngram_sizes": SIZES, "num_rows": table.shape[0] // len(SIZES), **kwargs}
    inputs = [table] if base is None else [table, base]
    out = fn(tokens, table, base=base, sparse_grad=sparse_grad, **kwargs)
    table_grad, *base_grad = torch.autograd.grad(out, inputs, grad.to(out.dtype))
    return [out, table_grad.to_dense(), *base_grad]


@pytest.mark.parametrize(("normalize", "sparse_grad"), [(False, False), (True, True)], ids=["plain", "normalize"])
@pytest.mark.parametrize(("table_dtype", "base_dtype"), DTYPE_PAIRS, ids=str)
def test_as_accurate_as_eager(table_dtype, base_dtype, normalize, sparse_grad):
    for width in (1, 70, 530):
        tokens = text_tokens(2, 33)
        table, base = make_inputs(tokens, width, 23, table_dtype, base_dtype)
        grad = torch.randn(2, 33, width, dtype=torch.float64).to(base_dtype or table_dtype)
        exact_base = None if base is None else base.detach().double().requires_grad_()
        kwargs = {"grad": grad, "normalize": normalize}
        ours = run(hash_ngram_embedding, tokens, table, base, sparse_grad=sparse_grad, **kwargs)
        eager = run(reference.hash_ngram_embedding, tokens, table, base, **kwargs)
        exact = run(
            reference.hash_ngram_embedding, tokens, table.detach().double().requires_grad_(), exact_base, **kwargs
        )
        assert ours[0].dtype == (base_dtype or table_dtype)
        for name, *values in zip(("out", "grad table", "grad base"), ours, eager, exact, strict=False):
            assert_as_accurate(*values, name=f"{name} width {width}")


def test_sums_in_fp32_whatever_the_dtype():
    # 1 + 6 * 2**-9 = 1 + 1.5 * 2**-7 in bf16: each addition alone would be rounded away.
    table = torch.full((6 * 5, 8), 2.0**-9, dtype=torch.bfloat16).requires_grad_()
    tokens = torch.zeros(1, 128, dtype=torch.int64)
    base = torch.ones(1, 128, 8, dtype=torch.bfloat16)
    out = hash_ngram_embedding(tokens, table, base=base, ngram_sizes=SIZES, num_rows=5)
    assert (out == 1 + 2**-6).all()
    (grad,) = torch.autograd.grad(out, table, torch.full_like(out, 1 + 2**-7))
    assert grad.max().item() == torch.tensor(128 * (1 + 2**-7)).bfloat16().item()


def test_normalize_divides_by_sizes_plus_one():
    tokens = text_tokens(1, 9)
    table, base = make_inputs(tokens, groups=12)
    kwargs = {"base": base, "ngram_sizes": SIZES, "num_rows": 23, "primes": HASH_PRIMES[:2]}
    out = hash_ngram_embedding(tokens, table, normalize=True, **kwargs)
    torch.testing.assert_close(out, hash_ngram_embedding(tokens, table, **kwargs) / 7)


def test_gradcheck():
    tokens = text_tokens(2, 7, 3)
    table, base = make_inputs(tokens, 3, 5, torch.float64, torch.float64)

    def fn(table, base):
        return hash_ngram_embedding(tokens, table, base=base, ngram_sizes=SIZES, num_rows=5, normalize=True)

    torch.autograd.gradcheck(fn, (table, base))


def test_rows_of_a_larger_table_are_read_in_place():
    tokens = text_tokens(2, 20)
    wide = torch.randn(6 * 23, 40, requires_grad=True)
    table = wide[:, 7:31]
    assert not table.is_contiguous()
    out = hash_ngram_embedding(tokens, table, ngram_sizes=SIZES, num_rows=23)
    same = hash_ngram_embedding(tokens, table.contiguous(), ngram_sizes=SIZES, num_rows=23)
    assert torch.equal(out, same)
    row = torch.randn(1, 24).expand(6 * 23, 24)
    torch.testing.assert_close(
        hash_ngram_embedding(tokens, row, ngram_sizes=SIZES, num_rows=23), (6 * row[0]).expand(2, 20, 24)
    )


def test_awkward_views():
    tokens = text_tokens(2, 33)
    table, base = make_inputs(tokens)
    grad = torch.randn(2, 33, 24)
    plain = run(hash_ngram_embedding, tokens, table, base, grad=grad)
    views = run(hash_ngram_embedding, awkward_view(tokens), table, awkward_view(base), grad=awkward_view(grad))
    transposed = run(hash_ngram_embedding, tokens, table, base, grad=grad.mT.contiguous().mT)
    for a, b, c in zip(plain, views, transposed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    cu_seqlens = torch.tensor([0, 0, 10, 10, 33, 33])[::2]
    ids = hash_ngram_ids(tokens[:1], SIZES, 23, cu_seqlens=cu_seqlens)
    assert torch.equal(ids, hash_ngram_ids(tokens[:1], SIZES, 23, cu_seqlens=cu_seqlens.clone()))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (1, 1), (3, 1)])
@pytest.mark.parametrize("width", [0, 1, 16])
def test_empty_and_single(shape, width):
    tokens = text_tokens(*shape)
    table, base = make_inputs(tokens, width)
    grad = torch.ones(*shape, width)
    for sparse_grad in (False, True):
        ours = run(hash_ngram_embedding, tokens, table, base, grad=grad, sparse_grad=sparse_grad)
        theirs = run(reference.hash_ngram_embedding, tokens, table, base, grad=grad)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert hash_ngram_ids(tokens, SIZES, 23).shape == (*shape, 6)


def test_only_what_needs_a_gradient_gets_one():
    tokens = text_tokens(2, 20)
    table, base = make_inputs(tokens)
    for normalize in (False, True):
        kwargs = {"ngram_sizes": SIZES, "num_rows": 23, "normalize": normalize}
        out = hash_ngram_embedding(tokens, table.detach(), base=base, **kwargs)
        (grad,) = torch.autograd.grad(out.sum(), base)
        torch.testing.assert_close(grad, torch.full_like(base, 1 / 7 if normalize else 1))
        out = hash_ngram_embedding(tokens, table, base=base.detach(), **kwargs)
        assert torch.autograd.grad(out.sum(), table)[0].shape == table.shape
        assert not hash_ngram_embedding(tokens, table.detach(), base=base.detach(), **kwargs).requires_grad
    with torch.inference_mode():
        assert torch.equal(hash_ngram_embedding(tokens, table, base=base.detach(), **kwargs), out)


def test_nan_and_infinity_stay_where_they_are_read():
    tokens = text_tokens(1, 40)
    table, base = make_inputs(tokens)
    ids = hash_ngram_ids(tokens, SIZES, 23)[0] + 23 * torch.arange(6)
    with torch.no_grad():
        table[ids[7, 2]], table[ids[9, 0]] = torch.nan, torch.inf
    out = hash_ngram_embedding(tokens, table, base=base, ngram_sizes=SIZES, num_rows=23)
    reads_nan, reads_inf = (ids == ids[7, 2]).any(1), (ids == ids[9, 0]).any(1)
    assert torch.equal(out[0].isnan().all(1), reads_nan)
    assert torch.equal(out[0].isinf().all(1), reads_inf & ~reads_nan)
    assert out[0][~reads_nan & ~reads_inf].isfinite().all()
    grad = torch.ones_like(out)
    grad[0, 11] = torch.nan
    (table_grad,) = torch.autograd.grad(out, table, grad)
    touched = torch.zeros(len(table), dtype=torch.bool)
    touched[ids[11]] = True
    assert torch.equal(table_grad.isnan().any(1), touched)


# ---- sparse gradients ------------------------------------------------------------------------------------------------


def embedding_gradient(tokens, table, grad):
    """The gradient that torch.nn.Embedding(sparse=True) gives, coalesced."""
    ids = hash_ngram_ids(tokens, SIZES, len(table) // 6) + len(table) // 6 * torch.arange(6)
    out = F.embedding(ids, table, sparse=True).sum(-2)
    return torch.autograd.grad(out, table, grad)[0].coalesce()


def test_sparse_gradient_is_the_coalesced_one_of_embedding():
    tokens = text_tokens(2, 60)
    table, _ = make_inputs(tokens, 24, 50)
    grad = torch.randn(2, 60, 24)
    ids = hash_ngram_ids(tokens, SIZES, 50)
    counts = (ids + 50 * torch.arange(6)).unique(return_counts=True)[1]
    assert (counts == 1).any() and (counts > 1).any()  # both ways of the kernel
    out = hash_ngram_embedding(tokens, table, ngram_sizes=SIZES, num_rows=50, sparse_grad=True)
    (ours,) = torch.autograd.grad(out, table, grad)
    theirs = embedding_gradient(tokens, table, grad)
    assert ours.layout == torch.sparse_coo and ours.is_coalesced() and ours.shape == table.shape
    torch._validate_sparse_coo_tensor_args(ours.indices(), ours.values(), ours.shape, is_coalesced=True)
    assert torch.equal(ours.indices(), theirs.indices())
    torch.testing.assert_close(ours.values(), theirs.values())
    dense = hash_ngram_embedding(tokens, table, ngram_sizes=SIZES, num_rows=50)
    assert torch.equal(torch.autograd.grad(dense, table, grad)[0], ours.to_dense())
    with use_backend("reference"):
        out = hash_ngram_embedding(tokens, table, ngram_sizes=SIZES, num_rows=50, sparse_grad=True)
        (again,) = torch.autograd.grad(out, table, grad)
    assert again.is_coalesced() and torch.equal(again.indices(), ours.indices())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_accumulate_and_stay_coalesced(backend):
    table, _ = make_inputs(torch.empty(0), 24, 50, base_dtype=None)
    expected = torch.zeros_like(table)
    with use_backend(backend):
        for n in (60, 40):
            tokens = text_tokens(1, n)
            grad = torch.randn(1, n, 24)
            hash_ngram_embedding(tokens, table, ngram_sizes=SIZES, num_rows=50, sparse_grad=True).backward(grad)
            expected += embedding_gradient(tokens, table, grad).to_dense()
            assert table.grad.is_coalesced()
            torch._validate_sparse_coo_tensor_args(
                table.grad.indices(), table.grad.values(), table.shape, is_coalesced=True
            )
    torch.testing.assert_close(table.grad.to_dense(), expected)
    assert len(table._post_accumulate_grad_hooks) == 1 and len(table._backward_hooks) == 1


def test_keep_coalesced_never_claims_what_is_not_so():
    table = torch.randn(5, 2, requires_grad=True)
    keep_coalesced(table)
    F.embedding(torch.tensor([3, 1, 3]), table, sparse=True).sum().backward()
    assert not table.grad.is_coalesced()
    table.grad = None
    (2 * table).sum().backward()
    assert table.grad.layout == torch.strided
    keep_coalesced(table.detach())  # nothing to keep


def sparse_backward(table, num_bytes=40):
    tokens = text_tokens(1, num_bytes)
    out = hash_ngram_embedding(tokens, table, ngram_sizes=SIZES, num_rows=len(table) // 6, sparse_grad=True)
    return out.sum()


def test_gradients_are_stored_without_a_copy():
    table, _ = make_inputs(torch.empty(0), 24, 50, base_dtype=None)
    arrived = []
    sparse_backward(table).backward()
    table.register_hook(lambda grad: arrived.append(grad._values().data_ptr()))
    table.grad = None
    sparse_backward(table).backward()
    assert table.grad._values().data_ptr() == arrived[0] and table.grad.is_coalesced()


def test_a_table_with_hooks_is_copied_and_saved_without_them(tmp_path):
    table, _ = make_inputs(torch.empty(0), 24, 50, base_dtype=None)
    sparse_backward(table).backward()
    table.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(table, tmp_path / "table")
        copies = [copy.deepcopy(table), torch.load(tmp_path / "table")]
    for other in copies:
        assert torch.equal(other, table) and not other._backward_hooks and not other._post_accumulate_grad_hooks


def test_sums_and_replaced_gradients_are_not_taken_for_coalesced():
    table, _ = make_inputs(torch.empty(0), 24, 50, base_dtype=None)
    others = torch.tensor([200, 3, 3])

    def assert_honest(expected_rows):
        rows = table.grad._indices()[0]
        assert not table.grad.is_coalesced() or (rows[1:] > rows[:-1]).all()
        assert set(rows.tolist()) >= expected_rows
        table.grad = None

    (sparse_backward(table) + F.embedding(others, table, sparse=True).sum()).backward()  # summed on their way
    assert_honest({200, 3})
    sparse_backward(table).backward()
    F.embedding(others, table, sparse=True).sum().backward()  # summed where they are stored
    assert_honest({200, 3})
    F.embedding(others, table, sparse=True).sum().backward()
    sparse_backward(table).backward()
    assert_honest({200, 3})
    torch.autograd.grad(sparse_backward(table), table)  # never stored
    F.embedding(others, table, sparse=True).sum().backward()
    assert_honest({200, 3})
    table.grad = torch.sparse_coo_tensor([[200, 3]], torch.ones(2, 24), table.shape, check_invariants=True)
    sparse_backward(table).backward()
    assert_honest({200, 3})

    def reverse(grad):
        indices, values = grad._indices().flip(1), grad._values().flip(0)
        return torch.sparse_coo_tensor(indices, values, grad.shape, check_invariants=True)

    table.register_hook(reverse)
    sparse_backward(table).backward()
    assert not table.grad.is_coalesced()


def test_a_sum_that_torch_leaves_as_it_is_is_not_marked():
    """On CUDA torch adds sparse gradients by putting one behind the other."""
    table, _ = make_inputs(torch.empty(0), 24, 50, base_dtype=None)
    sparse_backward(table).backward()
    (hook,) = table._post_accumulate_grad_hooks.values()
    first, second = table.grad, torch.autograd.grad(sparse_backward(table), table)[0]
    hook.__self__.arrives(second)
    indices = torch.cat([first._indices(), second._indices()], 1)
    table.grad = torch.sparse_coo_tensor(indices, torch.cat([first._values(), second._values()]), table.shape)
    hook(table)
    assert not table.grad.is_coalesced()
    hook.__self__.arrives(second)
    table.grad = torch.sparse_coo_tensor(second._indices(), second._values(), table.shape)
    assert not table.grad.is_coalesced()
    hook(table)
    assert table.grad.is_coalesced()


def test_sparse_adam_steps_as_with_embedding():
    tables = [make_inputs(torch.empty(0), 24, 50, base_dtype=None)[0] for _ in range(2)]
    with torch.no_grad():
        tables[1].copy_(tables[0])
    optimizers = [torch.optim.SparseAdam([table], lr=0.1) for table in tables]
    for _ in range(3):
        tokens, grad = text_tokens(1, 40), torch.randn(1, 40, 24)
        hash_ngram_embedding(tokens, tables[0], ngram_sizes=SIZES, num_rows=50, sparse_grad=True).backward(grad)
        tables[1].grad = embedding_gradient(tokens, tables[1], grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(tables[0], tables[1])


# ---- gradients by rows -----------------------------------------------------------------------------------------------


def assert_padded(padded, rows, values):
    """`padded`, from hash_ngram_embedding_row_grad, begins with these rows and values, and adds nothing to them."""
    padded_rows, padded_values, count = padded
    n = len(rows)
    assert count.shape == () and count.dtype == torch.int64 and count == n
    assert padded_rows.dtype == torch.int64 and padded_values.dtype == values.dtype
    assert torch.equal(padded_rows[:n], rows) and torch.equal(padded_values[:n], values)
    assert (padded_rows[n:] == padded_rows[n - 1]).all() and (padded_values[n:] == 0).all()


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 7, 7, 40])], ids=["rows", "packed"])
@pytest.mark.parametrize("normalize", [False, True])
def test_row_grad_is_the_sparse_gradient_padded(normalize, cu_seqlens):
    tokens = text_tokens(1, 60)
    grad = torch.randn(1, 60, 24, dtype=torch.bfloat16)
    kwargs = {"num_rows": 50, "cu_seqlens": cu_seqlens, "normalize": normalize, "table_dtype": torch.float32}
    padded = hash_ngram_embedding_row_grad(grad, tokens, ngram_sizes=SIZES, **kwargs)
    args = (grad, tokens, list(SIZES), 50, [HASH_PRIMES[0]], cu_seqlens, normalize, torch.float32)
    rows, values = torch.ops.blt_kernels.hash_ngram_embedding_sparse_backward(*args)
    assert padded[0].shape == (360,) and padded[1].shape == (360, 24) and 1 < len(rows) < 360
    assert_padded(padded, rows, values)
    with use_backend("reference"):
        again = hash_ngram_embedding_row_grad(grad, tokens, ngram_sizes=SIZES, **kwargs)
    assert_padded(again, rows, again[1][: len(rows)])
    torch.testing.assert_close(again[1], padded[1])


@pytest.mark.parametrize(("table_dtype", "grad_dtype"), DTYPE_PAIRS, ids=str)
def test_row_grad_is_as_accurate_as_eager(table_dtype, grad_dtype):
    tokens = text_tokens(2, 33)
    grad = torch.randn(2, 33, 70, dtype=torch.float64).to(grad_dtype or table_dtype)
    kwargs = {"ngram_sizes": SIZES, "num_rows": 23, "normalize": True}
    _, ours, _ = hash_ngram_embedding_row_grad(grad, tokens, table_dtype=table_dtype, **kwargs)
    _, eager, _ = reference.hash_ngram_embedding_row_grad(grad, tokens, table_dtype=table_dtype, **kwargs)
    _, exact, _ = reference.hash_ngram_embedding_row_grad(grad.double(), tokens, **kwargs)
    assert_as_accurate(ours, eager, exact)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_adding_row_grad_is_a_step_of_gradient_descent(backend):
    tokens = text_tokens(2, 40)
    table, base = make_inputs(tokens, 24, 50)
    grad = torch.randn(2, 40, 24)
    hash_ngram_embedding(tokens, table, base=base, ngram_sizes=SIZES, num_rows=50).backward(grad)
    stepped = table.detach().clone()
    torch.optim.SGD([table], lr=0.1).step()
    with use_backend(backend):
        out = hash_ngram_embedding(tokens, stepped, base=base, ngram_sizes=SIZES, num_rows=50)
        (out_grad,) = torch.autograd.grad(out, out, grad)
        rows, values, _ = hash_ngram_embedding_row_grad(out_grad, tokens, ngram_sizes=SIZES, num_rows=50)
    stepped.index_add_(0, rows, values, alpha=-0.1)
    torch.testing.assert_close(stepped, table.detach())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
@pytest.mark.parametrize("width", [0, 3])
def test_row_grad_empty_and_single(shape, width, backend):
    with use_backend(backend):
        rows, values, count = hash_ngram_embedding_row_grad(
            torch.ones(*shape, width), text_tokens(*shape), ngram_sizes=SIZES, num_rows=23
        )
    entries = 6 * shape[0] * shape[1]
    assert rows.shape == (entries,) and values.shape == (entries, width) and count == entries and (values == 1).all()


def test_row_grad_compiles_without_dynamic_sizes():
    def step(tokens, table, grad):
        rows, values, count = hash_ngram_embedding_row_grad(grad * 2, tokens, ngram_sizes=SIZES, num_rows=23)
        return table.index_add(0, rows, values, alpha=-0.1), count

    table, _ = make_inputs(torch.empty(0), base_dtype=None)
    with assert_no_recompile():
        compiled = torch.compile(step, fullgraph=True, dynamic=False)
        for vocabulary in (1, 3, 50):
            args = (text_tokens(2, 33, vocabulary), table.detach(), torch.randn(2, 33, 24))
            for a, b in zip(compiled(*args), step(*args), strict=True):
                torch.testing.assert_close(a, b)


def test_row_grad_has_no_second_derivative():
    grad = torch.randn(1, 9, 4, requires_grad=True)
    _, values, _ = hash_ngram_embedding_row_grad(grad, text_tokens(1, 9), ngram_sizes=SIZES, num_rows=23)
    with pytest.raises(RuntimeError, match="hash_ngram_embedding has no second derivative"):
        values.sum().backward()


# ---- the machinery ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_every_element_is_written(poisoned_memory, sparse_grad):
    tokens = text_tokens(2, 33)
    table, base = make_inputs(tokens, 70)
    grad = torch.randn(2, 33, 70)
    ours = run(hash_ngram_embedding, tokens, table, base, grad=grad, sparse_grad=sparse_grad)
    for a, b in zip(ours, run(reference.hash_ngram_embedding, tokens, table, base, grad=grad), strict=True):
        torch.testing.assert_close(a, b)
    ids = hash_ngram_ids(tokens, SIZES, 23)
    assert (ids >= 0).all() and (ids < 23).all()
    rows, values, _ = hash_ngram_embedding_row_grad(grad, tokens, ngram_sizes=SIZES, num_rows=23)
    torch.testing.assert_close(torch.zeros_like(table).index_add(0, rows, values), ours[1])


@pytest.mark.parametrize("width", [1024, 1020])  # rows of whole and of broken cache lines
@pytest.mark.parametrize("table_dtype", LOW_DTYPES, ids=str)
def test_outputs_larger_than_the_caches(width, table_dtype):
    tokens = torch.randint(0, 2**31, (1, 4096))
    tokens[0, 2048:3000] = tokens[0, :952]  # some rows are read twice
    table = torch.randn(6 * 2000, width).to(table_dtype)
    grad = torch.randn(1, 4096, width)
    args = (grad, tokens, list(SIZES), 2000, [HASH_PRIMES[0]], None, False, table_dtype)
    rows, values = torch.ops.blt_kernels.hash_ngram_embedding_sparse_backward(*args)
    assert_padded(torch.ops.blt_kernels.hash_ngram_embedding_row_grad(*args), rows, values)
    dense = torch.ops.blt_kernels.hash_ngram_embedding_backward(*args)
    assert torch.equal(dense[rows], values)
    assert dense.abs().sum(1).count_nonzero() == len(rows)
    ids = (hash_ngram_ids(tokens, SIZES, 2000) + 2000 * torch.arange(6))[0]
    exact = torch.zeros(len(table), width).index_add_(0, ids.flatten(), grad[0].repeat_interleave(6, 0))
    torch.testing.assert_close(dense, exact.to(table_dtype), rtol=1.6e-2, atol=1e-3)
    base = torch.randn(4, 4096, width)
    out = hash_ngram_embedding(tokens.expand(4, -1), table, base=base, ngram_sizes=SIZES, num_rows=2000)
    torch.testing.assert_close(out[3], base[3] + F.embedding_bag(ids, table.float(), mode="sum"))


def test_same_for_any_number_of_threads():
    tokens = text_tokens(3, 700, 12)
    tokens[1] = 7  # rows that hundreds of positions read
    table, base = make_inputs(tokens, 600, 97, torch.bfloat16, torch.float32)
    grad = torch.randn(3, 700, 600)
    for sparse_grad in (False, True):
        assert_same_for_any_threads(
            lambda s=sparse_grad: run(hash_ngram_embedding, tokens, table, base, grad=grad, sparse_grad=s)
        )
    assert_same_for_any_threads(lambda: hash_ngram_embedding_row_grad(grad, tokens, ngram_sizes=SIZES, num_rows=97))
    assert_same_for_any_threads(lambda: hash_ngram_ids(tokens, SIZES, 97))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_processor(capability):
    run_with_capability(
        """
        from blt_kernels import hash_ngram_embedding, hash_ngram_ids, reference
        torch.manual_seed(0)
        kwargs = {"ngram_sizes": (3, 4, 5), "num_rows": 11}
        tokens = torch.randint(4, 9, (2, 50))
        assert torch.equal(hash_ngram_ids(tokens, **kwargs), reference.hash_ngram_ids(tokens, **kwargs))
        for table_dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for width, sparse_grad in ((70, False), (576, True)):
                table = torch.randn(33, width).to(table_dtype).requires_grad_()
                base = torch.randn(2, 50, width, dtype=torch.float64 if table_dtype == torch.float64 else torch.float32)
                out, same = (
                    fn(tokens, table, base=base, sparse_grad=sparse_grad, **kwargs)
                    for fn in (hash_ngram_embedding, reference.hash_ngram_embedding)
                )
                torch.testing.assert_close(out, same)
                grads = [torch.autograd.grad(o.sum(), table)[0].to_dense().float() for o in (out, same)]
                torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-3)
        grad = torch.ones(1, 2048, 1024)  # 32 MB and more are written past the caches
        backward = torch.ops.blt_kernels.hash_ngram_embedding_sparse_backward
        rows, values = backward(grad, torch.arange(2048)[None], [1, 2, 3, 4], 5000, [1], None, True, torch.float32)
        ids = hash_ngram_ids(torch.arange(2048)[None], (1, 2, 3, 4), 5000, primes=[1]) + 5000 * torch.arange(4)
        counts = torch.zeros(20000).index_add_(0, ids.flatten(), torch.ones(4 * 2048))
        torch.testing.assert_close(values, (counts[rows] / 5)[:, None].expand(-1, 1024))
        """,
        capability,
    )


def test_opcheck():
    # Not `hash_ngram_embedding_sparse_grad`: its fake is dense on purpose, see blt_kernels/ops/_sparse_gradient.py.
    tokens, cu_seqlens = text_tokens(1, 20), torch.tensor([0, 7, 20])
    table, base = make_inputs(tokens, 5, 11)
    sizes, primes = list(SIZES), [HASH_PRIMES[0]]
    opcheck("hash_ngram_ids", (tokens, sizes, 11, primes, cu_seqlens))
    opcheck("hash_ngram_ids", (tokens.expand(3, -1).int(), sizes, 11, primes, None))
    opcheck("hash_ngram_embedding", (tokens, table, base, sizes, 11, primes, cu_seqlens, True, False))
    opcheck("hash_ngram_embedding", (tokens, table.detach(), None, sizes, 11, primes, None, False, False))
    opcheck("hash_ngram_embedding", (tokens, table.detach(), base, sizes, 11, primes, None, True, True))
    for form in ("backward", "sparse_backward", "row_grad"):
        name = f"hash_ngram_embedding_{form}"
        opcheck(name, (torch.randn(1, 20, 5), tokens, sizes, 11, primes, cu_seqlens, True, torch.float32))
        opcheck(name, (torch.randn(1, 20, 5), tokens, sizes, 11, primes, None, False, torch.bfloat16))


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_compiles_once(sparse_grad):
    def fn(tokens, table, base, cu_seqlens):
        embedded = hash_ngram_embedding(
            tokens,
            table,
            base=base * 2,
            ngram_sizes=SIZES,
            num_rows=23,
            cu_seqlens=cu_seqlens,
            sparse_grad=sparse_grad,
        )
        return embedded * 3, hash_ngram_ids(tokens, (2,), 23, cu_seqlens=cu_seqlens)

    table, _ = make_inputs(torch.empty(0), base_dtype=None)
    if sparse_grad:
        keep_coalesced(table)
    with assert_no_recompile():
        compiled = torch.compile(fn, fullgraph=True, dynamic=True)
        for lengths in ([10, 3, 20], [1, 31, 1], [33, 0, 0], [11, 11, 11]):
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
            tokens = text_tokens(1, 33)
            base = torch.randn(1, 33, 24, requires_grad=True)
            results = []
            for f in (compiled, fn):
                table.grad = base.grad = None
                out, ids = f(tokens, table, base, cu_seqlens)
                out.sin().sum().backward()
                assert table.grad.is_sparse == sparse_grad and (not sparse_grad or table.grad.is_coalesced())
                results.append((out, ids, table.grad.to_dense(), base.grad))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


def lookup(tokens, table):
    return hash_ngram_embedding(tokens, table, ngram_sizes=SIZES, num_rows=23, sparse_grad=True)


def sliced(tokens, table):
    """The compiler rewrites the gradient of a slice, and then looks again at all nodes that follow it."""
    return lookup(tokens, table)[:, 1:].sin()


def checkpointed(tokens, table):
    return torch.utils.checkpoint.checkpoint(lambda t: lookup(t, table).sin(), tokens, use_reentrant=False)


@pytest.mark.parametrize(
    ("fn", "options"),
    [
        (sliced, {}),
        (sliced, {"dynamic": True}),
        (checkpointed, {}),
        (lookup, {"mode": "reduce-overhead"}),
        (lookup, {"backend": "aot_eager"}),
        (lookup, {"fullgraph": False}),
    ],
    ids=["sliced", "dynamic", "checkpoint", "reduce-overhead", "aot_eager", "graphs may break"],
)
def test_compiled_gradients_are_sparse_and_accumulate(fn, options):
    table, _ = make_inputs(torch.empty(0), base_dtype=None)
    keep_coalesced(table)
    compiled = torch.compile(fn, **({"fullgraph": True} | options))
    results = []
    for run_once in (compiled, fn):
        table.grad = None
        for seed in range(2):
            torch.manual_seed(seed)
            tokens = text_tokens(2, 33)
            run_once(tokens, table).sum().backward()
            assert table.grad.is_sparse and (seed or table.grad.is_coalesced())
        (alone,) = torch.autograd.grad(run_once(tokens, table).sum(), table)
        assert alone.is_sparse and alone.is_coalesced()
        results.append((table.grad.to_dense(), alone.to_dense()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def looked_up_twice(tokens, table):
    return lookup(tokens, table) + lookup(tokens * 2, table).sin()


def computed_in_the_graph(tokens, table):
    return lookup(tokens, table * 2).sin()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("fn", [looked_up_twice, computed_in_the_graph])
def test_gradients_that_a_graph_computes_with_are_dense(fn, backend):
    tokens, (table, _) = text_tokens(2, 33), make_inputs(torch.empty(0), base_dtype=None)
    (expected,) = torch.autograd.grad(fn(tokens, table).sum(), table)
    (got,) = torch.autograd.grad(torch.compile(fn, fullgraph=True, backend=backend)(tokens, table).sum(), table)
    assert not got.is_sparse
    torch.testing.assert_close(got, expected.to_dense())


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    module = HashNgramEmbedding(23, 8, SIZES, sparse_grad=True)
    torch.nn.init.normal_(module.weight)
    tokens = text_tokens(2, 33)
    program = torch.export.export(module, (tokens,), strict=strict)
    torch.testing.assert_close(program.module()(tokens), module(tokens))


def test_autocast_leaves_the_table_alone():
    tokens = text_tokens(1, 9)
    table, base = make_inputs(tokens)
    kwargs = {"ngram_sizes": SIZES, "num_rows": 23}
    plain = hash_ngram_embedding(tokens, table, base=base, **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hash_ngram_embedding(tokens, table, base=base, **kwargs), plain)
        low = hash_ngram_embedding(tokens, table, base=base.bfloat16(), **kwargs)
    assert low.dtype == torch.bfloat16
    low.sum().backward()
    assert table.grad.dtype == torch.float32


def test_meta_tensors_have_the_right_shapes():
    tokens = torch.empty(2, 9, dtype=torch.int32, device="meta")
    table = torch.empty(6 * 23, 24, device="meta")
    kwargs = {"ngram_sizes": SIZES, "num_rows": 23}
    assert hash_ngram_ids(tokens, SIZES, 23).shape == (2, 9, 6)
    out = hash_ngram_embedding(tokens, table, base=torch.empty(2, 9, 24, device="meta").half(), **kwargs)
    assert out.shape == (2, 9, 24) and out.dtype == torch.float16
    rows, values, count = hash_ngram_embedding_row_grad(out, tokens, table_dtype=torch.float32, **kwargs)
    assert rows.shape == (108,) and values.shape == (108, 24) and values.dtype == torch.float32 and count.shape == ()


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_double_backward_is_an_explained_error(sparse_grad):
    tokens = text_tokens(1, 9)
    table, base = make_inputs(tokens)
    out = hash_ngram_embedding(tokens, table, base=base, ngram_sizes=SIZES, num_rows=23, sparse_grad=sparse_grad)
    (grad,) = torch.autograd.grad(out.square().sum(), table, create_graph=True)
    values = grad.to_dense() if sparse_grad else grad
    with pytest.raises(RuntimeError, match="hash_ngram_embedding has no second derivative"):
        values.sum().backward()


TOKENS, TABLE = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(6 * 23, 24)
CU = torch.tensor([0, 9])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": [[1]]}, TypeError, "tokens: expected a torch.Tensor, got list"),
        ({"tokens": TOKENS.float()}, TypeError, "tokens: expected dtype int32 or int64, got float32"),
        ({"tokens": TOKENS[0]}, ValueError, r"tokens: expected 2 dimensions, got shape \(9,\)"),
        ({"ngram_sizes": 3}, TypeError, "ngram_sizes: expected a sequence of ints, got int"),
        ({"ngram_sizes": [3.0]}, TypeError, "ngram_sizes: expected an int, got float"),
        ({"ngram_sizes": [True]}, TypeError, "ngram_sizes: expected an int, got bool"),
        ({"ngram_sizes": []}, ValueError, "ngram_sizes: expected at least one, got none"),
        ({"ngram_sizes": [3, 0]}, ValueError, "ngram_sizes: expected 1 .. 9223372036854775807, got 0"),
        (
            {"ngram_sizes": [1] * 1025},
            ValueError,
            r"ngram_sizes: expected at most 1024 \(times primes\), got 1 \* 1025",
        ),
        ({"num_rows": 0}, ValueError, "num_rows: expected 1 .. 9223372036854775807, got 0"),
        ({"num_rows": 2**63}, ValueError, "num_rows: expected 1 .. 9223372036854775807, got 9223372036854775808"),
        ({"num_rows": 2.0}, TypeError, "num_rows: expected an int, got float"),
        ({"primes": []}, ValueError, "primes: expected at least one, got none"),
        ({"primes": [2**63]}, ValueError, "primes: expected"),
        ({"primes": 7}, TypeError, "primes: expected a sequence of ints, got int"),
        ({"cu_seqlens": [0, 9]}, TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
        ({"cu_seqlens": CU}, ValueError, r"tokens: expected one row \(B = 1\) with cu_seqlens, got B = 2"),
        ({"tokens": TOKENS[:1], "cu_seqlens": CU.float()}, TypeError, "cu_seqlens: expected dtype int32 or int64"),
        ({"tokens": TOKENS[:1], "cu_seqlens": CU[:0]}, ValueError, r"cu_seqlens: expected shape \(S \+ 1,\)"),
        ({"tokens": TOKENS[:1], "cu_seqlens": CU.to("meta")}, ValueError, "cu_seqlens: expected device cpu"),
    ],
)
def test_errors_of_all(change, error, message):
    kwargs = {"tokens": TOKENS, "ngram_sizes": SIZES, "num_rows": 23, **change}
    with pytest.raises(error, match="hash_ngram_ids: " + message):
        hash_ngram_ids(**kwargs)
    with pytest.raises(error, match="hash_ngram_embedding: " + message):
        hash_ngram_embedding(table=TABLE, **kwargs)
    with pytest.raises(error, match="hash_ngram_embedding_row_grad: " + message):
        hash_ngram_embedding_row_grad(torch.zeros(2, 9, 24), **kwargs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"table": [0.0]}, TypeError, "table: expected a torch.Tensor, got list"),
        (
            {"table": TABLE.int()},
            TypeError,
            "table: expected dtype float32 or float64 or bfloat16 or float16, got int32",
        ),
        ({"table": TABLE[1:]}, ValueError, r"table: expected shape \(138, \*\), got shape \(137, 24\)"),
        ({"table": TABLE[None]}, ValueError, "table: expected 2 dimensions"),
        ({"table": TABLE.to_sparse()}, TypeError, "table: expected a dense"),
        ({"table": TABLE.to("meta")}, ValueError, r"table: expected device cpu \(where tokens is\), got device meta"),
        ({"table": TABLE.mT.contiguous().mT}, ValueError, "table: expected rows of adjacent elements"),
        ({"base": 1.0}, TypeError, "base: expected a torch.Tensor, got float"),
        ({"base": torch.zeros(2, 9, 23)}, ValueError, r"base: expected shape \(2, 9, 24\), got shape \(2, 9, 23\)"),
        ({"base": torch.zeros(2, 9, 24).long()}, TypeError, "base: expected dtype"),
        ({"base": torch.zeros(2, 9, 24).double()}, TypeError, "base: expected a dtype that goes with a float32 table"),
        ({"base": torch.zeros(2, 9, 24).to("meta")}, ValueError, "base: expected device cpu"),
        ({"normalize": "no"}, TypeError, "normalize: expected a bool, got str"),
        ({"sparse_grad": None}, TypeError, "sparse_grad: expected a bool, got NoneType"),
    ],
)
def test_errors_of_the_embedding(change, error, message):
    kwargs = {"tokens": TOKENS, "table": TABLE, "ngram_sizes": SIZES, "num_rows": 23, **change}
    with pytest.raises(error, match="hash_ngram_embedding: " + message):
        hash_ngram_embedding(**kwargs)


GRAD = torch.zeros(2, 9, 24)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": 1.0}, TypeError, "grad: expected a torch.Tensor, got float"),
        ({"grad": GRAD.long()}, TypeError, "grad: expected dtype float32 or"),
        ({"grad": GRAD[0]}, ValueError, "grad: expected 3 dimensions"),
        ({"grad": GRAD[:, 1:]}, ValueError, r"grad: expected shape \(2, 9, \*\), got shape \(2, 8, 24\)"),
        ({"grad": GRAD.to("meta")}, ValueError, r"grad: expected device cpu \(where tokens is\), got device meta"),
        ({"table_dtype": torch.int32}, TypeError, "table_dtype: expected float32 or .*, got int32"),
        ({"table_dtype": "float"}, TypeError, "table_dtype: expected float32 or .*, got float"),
        ({"table_dtype": torch.float64}, TypeError, "grad: expected a dtype that goes with a float64 table"),
        ({"grad": GRAD.double(), "table_dtype": torch.float32}, TypeError, "grad: expected a dtype that goes with"),
        ({"normalize": 1}, TypeError, "normalize: expected a bool, got int"),
    ],
)
def test_errors_of_row_grad(change, error, message):
    kwargs = {"grad": GRAD, "tokens": TOKENS, "ngram_sizes": SIZES, "num_rows": 23, **change}
    with pytest.raises(error, match="hash_ngram_embedding_row_grad: " + message):
        hash_ngram_embedding_row_grad(**kwargs)


@pytest.mark.parametrize("cu_seqlens", [[1, 9], [0, 5, 4], [0, 10], [0, -1]])
def test_bad_offsets_raise(cu_seqlens):
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(RuntimeError, match="hash_ngram_ids: cu_seqlens: expected"):
            hash_ngram_ids(TOKENS[:1], SIZES, 23, cu_seqlens=torch.tensor(cu_seqlens, dtype=dtype))
    with use_backend("reference"), pytest.raises(ValueError, match="hash_ngram_ids: cu_seqlens: expected values that"):
        hash_ngram_ids(TOKENS[:1], SIZES, 23, cu_seqlens=torch.tensor(cu_seqlens))


def test_direct_calls_are_checked_too():
    ops = torch.ops.blt_kernels
    with pytest.raises(RuntimeError, match="hash_ngram_ids: tokens: expected dtype int32 or int64"):
        ops.hash_ngram_ids(TOKENS.float(), [3], 23, [7], None)
    with pytest.raises(RuntimeError, match="ngram_sizes: expected sizes of at least 1, got 0"):
        ops.hash_ngram_ids(TOKENS, [3, 0], 23, [7], None)
    for sizes, num_rows, primes in (([], 23, [7]), ([3], 0, [7]), ([3], 23, []), ([3] * 2000, 23, [7])):
        with pytest.raises(RuntimeError, match="hash_ngram_ids: "):
            ops.hash_ngram_ids(TOKENS, sizes, num_rows, primes, None)
    embed = ops.hash_ngram_embedding
    for table, base in (
        (TABLE[1:], None),
        (TABLE.mT.contiguous().mT, None),
        (TABLE.int(), None),
        (TABLE, torch.zeros(2, 9, 24).double()),
        (TABLE, torch.zeros(2, 9, 23)),
        (TABLE, torch.zeros(2, 24)),
    ):
        with pytest.raises(RuntimeError, match="hash_ngram_embedding: "):
            embed(TOKENS, table, base, list(SIZES), 23, [7], None, False, False)
    for form in ("backward", "sparse_backward", "row_grad"):
        backward = getattr(ops, f"hash_ngram_embedding_{form}")
        with pytest.raises(RuntimeError, match=r"num_rows: expected num_rows \* tables \* tokens below 2\*\*63"):
            backward(torch.zeros(2, 9, 4), TOKENS, [3], 2**62, [7], None, False, torch.float32)
        with pytest.raises(RuntimeError, match=f"hash_ngram_embedding_{form}: grad: expected size 9"):
            backward(torch.zeros(2, 8, 4), TOKENS, [3], 23, [7], None, False, torch.float32)
        with pytest.raises(RuntimeError, match="grad: float64"):
            backward(torch.zeros(2, 9, 4).double(), TOKENS, [3], 23, [7], None, False, torch.float32)


def test_everything_is_public():
    names = {"HASH_PRIMES", "hash_ngram_ids", "hash_ngram_embedding", "hash_ngram_embedding_row_grad", "keep_coalesced"}
    assert names <= set(blt_kernels.__all__)
    assert len(HASH_PRIMES) == 11 and HASH_PRIMES[0] == 1000000007
