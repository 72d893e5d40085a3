import pytest
import torch
from helpers import assert_as_accurate, awkward_view

from blt_kernels import HASH_PRIMES, reference

SIZES = [3, 4, 5, 6, 7, 8]
PRIME = [HASH_PRIMES[0]]
LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_PAIRS = [(torch.float64, None), (torch.float64, torch.float64)] + [
    (table, base) for table in LOW_DTYPES for base in (None, *LOW_DTYPES)
]
CPU = torch.ops.blt_kernels


def text_tokens(batch, num_bytes, vocabulary=5):
    """Tokens of few different values, so that n-grams repeat as in text."""
    return torch.randint(4, 4 + vocabulary, (batch, num_bytes))


def run(ops, tokens, table, base, grad, num_rows, sizes=SIZES, primes=PRIME, cu_seqlens=None, normalize=False):
    """Output, dense gradient, rows and values of the sparse one, and rows, values and count of the padded one."""
    out = ops.hash_ngram_embedding(tokens, table, base, sizes, num_rows, primes, cu_seqlens, normalize, False)
    args = (grad, tokens, sizes, num_rows, primes, cu_seqlens, normalize, table.dtype)
    dense, sparse = ops.hash_ngram_embedding_backward(*args), ops.hash_ngram_embedding_sparse_backward(*args)
    return out, dense, *sparse, *ops.hash_ngram_embedding_row_grad(*args)


def run_reference(tokens, table, base, grad, num_rows, dtype=None, **kwargs):
    """Output and dense gradient."""
    leaf = table.detach().to(dtype or table.dtype).requires_grad_()
    base = base if base is None else base.to(dtype or base.dtype)
    kwargs = {"ngram_sizes": SIZES, "primes": PRIME, **kwargs}
    out = reference.hash_ngram_embedding(tokens, leaf, base=base, num_rows=num_rows, **kwargs)
    return out.detach(), torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]


def check(cuda_ops, tokens, table, base, grad, num_rows, **kwargs):
    """Against the reference, and against the CPU op, whose rows are the same."""
    out, dense, rows, values, *padded = run(cuda_ops, tokens, table, base, grad, num_rows, **kwargs)
    named = {"ngram_sizes" if name == "sizes" else name: value for name, value in kwargs.items()}
    eager = run_reference(tokens, table, base, grad, num_rows, **named)
    exact = run_reference(tokens, table, base, grad, num_rows, dtype=torch.float64, **named)
    for name, *three in zip(("out", "gradient"), (out, dense), eager, exact, strict=True):
        assert_as_accurate(*three, f"{name} width {table.shape[1]}")
    assert torch.equal(rows, run(CPU, tokens, table, base, grad, num_rows, **kwargs)[2])
    assert torch.equal(dense[rows], values)
    assert_padded(padded, rows, values)
    unread = torch.ones(len(table), dtype=torch.bool)
    unread[rows] = False
    assert (dense[unread] == 0).all()


def assert_padded(padded, rows, values):
    padded_rows, padded_values, count = padded
    n = len(rows)
    assert count.shape == () and count.dtype == torch.int64 and count == n
    assert torch.equal(padded_rows[:n], rows) and torch.equal(padded_values[:n], values)
    assert (padded_rows[n:] == padded_rows[n - 1]).all() and (padded_values[n:] == 0).all()


def make_inputs(tokens, width, num_rows, table_dtype=torch.float32, base_dtype=torch.float32, tables=6):
    table = torch.randn(tables * num_rows, width, dtype=torch.float64).to(table_dtype)
    shape = (*tokens.shape, width)
    base = None if base_dtype is None else torch.randn(shape, dtype=torch.float64).to(base_dtype)
    return table, base, torch.randn(shape, dtype=torch.float64).to(base_dtype or table_dtype)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# ---- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 3, 64, 500002, 2**31 - 1, 2**31, 2**40 + 1, 2**62, 2**63 - 1])
def test_ids_are_exact_for_any_int64(cuda_ops, num_rows):
    edges = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**32)]
    multiples = [k * num_rows + d for k in (1, -1, 2, 2**62 // num_rows) for d in (-1, 0, 1)]
    random = torch.randint(-(2**63), 2**63 - 1, (100,)).tolist()
    tokens = torch.tensor([edges + [t for t in multiples if -(2**63) <= t < 2**63] + random])
    for sizes, primes in (([1, 2, 3, 8], [HASH_PRIMES[0], HASH_PRIMES[6], 2**63 - 1, -3]), ([1], PRIME)):
        expected = reference.hash_ngram_ids(tokens, sizes, num_rows, primes=primes)
        assert torch.equal(cuda_ops.hash_ngram_ids(tokens, sizes, num_rows, primes, None), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_in_the_order_of_sizes_and_primes(cuda_ops, dtype):
    tokens, sizes, primes = text_tokens(3, 200, 260).to(dtype), [8, 1, 5, 5, 2], list(HASH_PRIMES[:3])
    expected = reference.hash_ngram_ids(tokens, sizes, 1009, primes=primes)  # 15 columns: 9 blocks
    assert torch.equal(cuda_ops.hash_ngram_ids(tokens, sizes, 1009, primes, None), expected)
    assert torch.equal(cuda_ops.hash_ngram_ids(awkward_view(tokens), sizes, 1009, primes, None), expected)


@pytest.mark.parametrize(
    ("sizes", "primes"), [(range(1, 129), 8), ([1, 39, 40, 41, 400], 2), (range(1, 301), 1), ([2**62], 1)]
)
def test_many_tables_and_long_ngrams(cuda_ops, sizes, primes):
    tokens = text_tokens(2, 40, 260)
    args = (tokens, list(sizes), 977, list(HASH_PRIMES[:primes]), None)
    assert torch.equal(cuda_ops.hash_ngram_ids(*args), CPU.hash_ngram_ids(*args))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[], [0], [30], [5, 0, 0, 1, 12], [0, 2, 7, 7, 7, 0, 0], [1] * 30])
def test_packed_sequences(cuda_ops, lengths, dtype):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    tokens = text_tokens(1, 30, 260)
    for offsets in (cu_seqlens, awkward_view(cu_seqlens)):
        ids = cuda_ops.hash_ngram_ids(tokens, SIZES, 977, PRIME, offsets)
        assert torch.equal(ids, reference.hash_ngram_ids(tokens, SIZES, 977, cu_seqlens=cu_seqlens))
    table, base, grad = make_inputs(tokens, 8, 23)
    check(cuda_ops, tokens, table, base, grad, 23, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("offsets", [[5, 10], [0, 20, 7, 30], [0, 1000], [-(2**40), -3, 4], [2**62, 2**62], [9, -9]])
def test_bad_offsets_are_clamped(cuda_ops, offsets):
    tokens = text_tokens(1, 30, 260)
    ids = cuda_ops.hash_ngram_ids(tokens, SIZES, 977, PRIME, torch.tensor(offsets))
    starts = {0, *(min(max(o, 0), 30) for o in offsets)}  # every sequence must start at one of these
    possible = [reference.hash_ngram_ids(tokens[:, start:], SIZES, 977)[0, :, :].tolist() for start in sorted(starts)]
    for j, row in enumerate(ids[0].tolist()):
        assert any(row == rows[j - start] for start, rows in zip(sorted(starts), possible, strict=True) if start <= j)


# ---- sums and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize(("table_dtype", "base_dtype"), DTYPE_PAIRS, ids=str)
def test_accuracy(cuda_ops, table_dtype, base_dtype, normalize):
    torch.manual_seed(0)
    for width in (1, 24, 70):
        tokens = text_tokens(2, 33)
        table, base, grad = make_inputs(tokens, width, 23, table_dtype, base_dtype)
        check(cuda_ops, tokens, table, base, grad, 23, normalize=normalize)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 520, 2050])
def test_widths_and_many_blocks(cuda_ops, width, table_dtype):
    torch.manual_seed(1)
    tokens = text_tokens(1, 2000 // width + 60, 3)
    table, base, grad = make_inputs(tokens, width, 50, table_dtype, torch.bfloat16)
    check(cuda_ops, tokens, table, base, grad, 50)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("num_bytes", [1, 2, 5, 7, 8, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("vocabulary", [1, 2])
def test_runs_of_all_lengths(cuda_ops, num_bytes, vocabulary):
    torch.manual_seed(num_bytes)
    tokens = text_tokens(1, num_bytes, vocabulary)
    table, base, grad = make_inputs(tokens, 12, 3, tables=2)
    check(cuda_ops, tokens, table, base, grad, 3, sizes=[1, 2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1, 17, 31])
def test_long_runs(cuda_ops, shift, dtype):
    """Runs around one, two and more tiles of sorted keys, which start anywhere in a tile."""
    torch.manual_seed(2)
    lengths = [shift, 32, 33, 1, 31, 64, 65, 2, 66, 200, 1, 1, 97, 40, 40, 40]
    tokens = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tokens = tokens[torch.randperm(len(tokens))][None]
    table, base, grad = make_inputs(tokens, 136, 20, dtype, None, tables=1)
    check(cuda_ops, tokens, table, base, grad, 20, sizes=[1])


def test_rows_that_every_position_reads(cuda_ops):
    torch.manual_seed(3)
    tokens = torch.zeros(2, 1500, dtype=torch.int64)  # so many parts that one warp does not join them alone
    table, base, grad = make_inputs(tokens, 20, 7, tables=2)
    check(cuda_ops, tokens, table, base, grad, 7, sizes=[1, 3])


def test_sums_in_fp32_whatever_the_dtype(cuda_ops):
    table = torch.full((6 * 5, 8), 2.0**-9, dtype=torch.bfloat16)
    tokens = torch.zeros(1, 128, dtype=torch.int64)
    base = torch.ones(1, 128, 8, dtype=torch.bfloat16)
    out, dense, *_ = run(cuda_ops, tokens, table, base, torch.full_like(base, 1 + 2**-7), 5)
    assert (out == 1 + 2**-6).all()
    assert dense.max().item() == torch.tensor(128 * (1 + 2**-7)).bfloat16().item()


def test_several_primes(cuda_ops):
    tokens = text_tokens(2, 50)
    sizes, primes = [5, 2, 3], list(HASH_PRIMES[:4])
    table, base, grad = make_inputs(tokens, 16, 11, tables=12)
    check(cuda_ops, tokens, table, base, grad, 11, sizes=sizes, primes=primes, normalize=True)
    tokens, many = tokens[:1, :7], list(range(1, 129))
    table, base, grad = make_inputs(tokens, 5, 3, torch.float64, None, tables=1024)
    args = (tokens, table, base, grad, 3, many, list(HASH_PRIMES[:8]))
    assert_same(run(cuda_ops, *args), run(CPU, *args))


def test_keys_beyond_int32(cuda_ops):
    tokens = text_tokens(1, 70, 3)
    args = (torch.randn(1, 70, 8), tokens, SIZES, 2**40 + 1, PRIME, None, False, torch.float32)
    ours = cuda_ops.hash_ngram_embedding_sparse_backward(*args)
    assert_same(ours, CPU.hash_ngram_embedding_sparse_backward(*args))
    assert_padded(cuda_ops.hash_ngram_embedding_row_grad(*args), *ours)


def test_nan_and_infinity_stay_in_their_rows(cuda_ops):
    tokens = torch.tensor([[1, 2, 3] * 40])
    table, _, grad = make_inputs(tokens, 8, 5, base_dtype=None, tables=1)
    grad[0, 3, 1], grad[0, 64, 2], grad[0, 2, 5] = torch.nan, torch.inf, -torch.inf
    _, dense, *_ = run(cuda_ops, tokens, table, None, grad, 5, sizes=[1])
    torch.testing.assert_close(dense, run_reference(tokens, table, None, grad, 5, ngram_sizes=[1])[1], equal_nan=True)
    assert dense.isnan().sum() == 1 and dense.isinf().sum() == 2


# ---- the machinery ---------------------------------------------------------------------------------------------------


def test_views(cuda_ops):
    tokens = text_tokens(2, 33)
    table, base, grad = make_inputs(tokens, 24, 23)
    plain = run(cuda_ops, tokens, table, base, grad, 23)
    for a, b in zip(plain, run(cuda_ops, awkward_view(tokens), table, base, grad, 23), strict=True):
        assert torch.equal(a, b)
    views = run(cuda_ops, tokens, table, awkward_view(base), grad.mT.contiguous().mT, 23)
    for a, b in zip(plain, views, strict=True):
        assert torch.equal(a, b)
    for columns in (slice(7, 31), slice(8, 32)):  # rows of a larger table are read in place
        wide = torch.randn(6 * 23, 40)
        args = (tokens, base, grad, 23)
        inside = run(cuda_ops, tokens, wide[:, columns], *args[1:])[0]
        assert torch.equal(inside, run(cuda_ops, tokens, wide[:, columns].contiguous(), *args[1:])[0])
    row = torch.randn(1, 24).expand(6 * 23, 24)
    torch.testing.assert_close(run(cuda_ops, tokens, row, None, grad, 23)[0], (6 * row[0]).expand(2, 33, 24))


def test_unaligned_addresses(cuda_ops):
    tokens = text_tokens(2, 33)
    table, base, grad = make_inputs(tokens, 24, 23, torch.bfloat16, torch.bfloat16)
    plain = run(cuda_ops, tokens, table, base, grad, 23)
    shift = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view_as(t).copy_(t) for t in (table, base, grad)]
    for a, b in zip(plain, run(cuda_ops, tokens, *shift, 23), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (1, 1), (3, 1)])
@pytest.mark.parametrize("width", [0, 1, 16])
def test_empty_and_single(cuda_ops, shape, width):
    tokens = text_tokens(*shape)
    table, base, grad = make_inputs(tokens, width, 23)
    assert_same(run(cuda_ops, tokens, table, base, grad, 23), run(CPU, tokens, table, base, grad, 23))
    ids = cuda_ops.hash_ngram_ids(tokens, SIZES, 23, PRIME, None)
    assert torch.equal(ids, CPU.hash_ngram_ids(tokens, SIZES, 23, PRIME, None))


def test_direct_calls_are_checked(cuda_ops):
    tokens, table = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(6 * 23, 24)
    cu_seqlens = torch.tensor([0, 9])
    for args in (
        (tokens.float(), SIZES, 23, PRIME, None),
        (tokens, [3, 0], 23, PRIME, None),
        (tokens, [], 23, PRIME, None),
        (tokens, [3], 0, PRIME, None),
        (tokens, [3], 23, [], None),
        (tokens, [3] * 2000, 23, PRIME, None),
        (tokens, [3], 23, PRIME, cu_seqlens),
        (tokens[:1], [3], 23, PRIME, cu_seqlens[:0]),
        (tokens[:1], [3], 23, PRIME, cu_seqlens.float()),
    ):
        with pytest.raises(RuntimeError, match="hash_ngram_ids: "):
            cuda_ops.hash_ngram_ids(*args)
    for bad_table, base in (
        (table[1:], None),
        (table.mT.contiguous().mT, None),
        (table.int(), None),
        (table, torch.zeros(2, 9, 24).double()),
        (table, torch.zeros(2, 9, 23)),
        (table, torch.zeros(2, 24)),
    ):
        with pytest.raises(RuntimeError, match="hash_ngram_embedding: "):
            cuda_ops.hash_ngram_embedding(tokens, bad_table, base, SIZES, 23, PRIME, None, False, False)
    for form in ("backward", "sparse_backward", "row_grad"):
        backward = getattr(cuda_ops, f"hash_ngram_embedding_{form}")
        for grad, num_rows, message in (
            (torch.zeros(2, 9, 4), 2**62, r"num_rows: expected num_rows \* tables \* tokens below 2\*\*63"),
            (torch.zeros(2, 8, 4), 23, "grad: expected size 9"),
            (torch.zeros(2, 9, 4).double(), 23, "grad: float64"),
        ):
            with pytest.raises(RuntimeError, match=f"hash_ngram_embedding_{form}: {message}"):
                backward(grad, tokens, [3], num_rows, PRIME, None, False, torch.float32)
