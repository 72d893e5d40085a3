"""patch_pool: values and gradients against loops over patches, ties, NaN, and rows that are split among threads."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import (
    CPU_CAPABILITIES,
    FLOAT_DTYPES,
    HUGE_PATCH,
    RAGGED,
    assert_as_accurate,
    assert_no_recompile,
    assert_same_for_any_threads,
    awkward_view,
    lengths_of,
    make_layout,
    num_threads,
    opcheck,
    ragged_lengths,
    random_lengths,
    run_with_capability,
)
from hypothesis import given
from hypothesis import strategies as st

from blt_kernels import PatchLayout, patch_pool, reference, use_backend

REDUCES = ("max", "mean", "min", "sum")
WIDTHS = (1, 3, 16, 33, 64, 200, 1030)  # around registers, strips of four of them, and blocks of columns
SMALL = make_layout(torch.tensor([[1, 5, 0, 2]]), 9)
INF, NAN = math.inf, math.nan


def loop(x: torch.Tensor, layout: PatchLayout, reduce: str) -> torch.Tensor:
    """patch_pool by a loop over patches, in the arithmetic of torch's own reductions."""
    fn = {"max": torch.amax, "min": torch.amin, "mean": torch.mean, "sum": torch.sum}[reduce]
    return torch.stack(
        [
            torch.stack([fn(row[a:e], 0) if e > a else row[:0].sum(0) for a, e in itertools.pairwise(offsets)])
            for row, offsets in zip(x, layout.offsets.tolist(), strict=True)
        ]
    )


def scatter(x: torch.Tensor, layout: PatchLayout, reduce: str) -> torch.Tensor:
    """patch_pool as people write it in eager PyTorch, in the dtype of x."""
    slot = torch.where(layout.patch_ids < 0, layout.capacity, layout.patch_ids).long()[:, :, None].expand_as(x)
    out = x.new_zeros((x.shape[0], layout.capacity + 1, x.shape[2]))
    name = {"max": "amax", "min": "amin", "mean": "mean", "sum": "sum"}[reduce]
    return out.scatter_reduce(1, slot, x, name, include_self=False)[:, :-1]


def value_and_grad(fn, x: torch.Tensor, layout: PatchLayout, reduce: str, grad: torch.Tensor):
    x = x.detach().clone().requires_grad_()
    out = fn(x, layout, reduce)
    out.backward(grad.to(out.dtype))
    return out.detach(), x.grad


def check(layout: PatchLayout, width: int, dtype: torch.dtype, reduce: str) -> None:
    """Values and gradients against a loop (max, min: exactly; else as accurate as eager). Many values are tied."""
    x = torch.randn(layout.offsets.shape[0], layout.num_bytes, width).mul(4).round().div(4).to(dtype)
    grad = torch.randn(layout.offsets.shape[0], layout.capacity, width).to(dtype)
    out, grad_x = value_and_grad(patch_pool, x, layout, reduce, grad)
    exact = value_and_grad(loop, x.double(), layout, reduce, grad)
    eager = value_and_grad(scatter, x, layout, reduce, grad)
    if reduce in ("max", "min"):
        assert torch.equal(out, exact[0].to(dtype))
    assert_as_accurate(out, eager[0], exact[0], f"{reduce} {dtype}")
    assert_as_accurate(grad_x, eager[1], exact[1], f"gradient of {reduce} {dtype}")


def check_everything() -> None:
    """What the tests of one processor's kernels run."""
    for width in WIDTHS:
        for dtype in FLOAT_DTYPES:
            for reduce in REDUCES:
                check(SMALL, width, dtype, reduce)
    check(make_layout(torch.tensor([[1, 300, 2]])), 20, torch.float32, "max")
    nan = torch.tensor([[[NAN], [1.0], [2.0]]])
    assert patch_pool(nan, make_layout(torch.tensor([[2, 1]]))).isnan().flatten().tolist() == [True, False]


def test_golden_values() -> None:
    layout = make_layout(torch.tensor([[1, 0, 3, 2]]))
    x = torch.tensor([[[7.0, -1.0], [1.0, -2.0], [2.0, -4.0], [6.0, -3.0], [5.0, 8.0], [5.0, 0.0]]])
    expected = {
        "max": [[7, -1], [0, 0], [6, -2], [5, 8]],
        "mean": [[7, -1], [0, 0], [3, -3], [5, 4]],
        "min": [[7, -1], [0, 0], [1, -4], [5, 0]],
        "sum": [[7, -1], [0, 0], [9, -9], [10, 8]],
    }
    for reduce, values in expected.items():
        assert patch_pool(x, layout, reduce).tolist() == [values]
    assert torch.equal(patch_pool(x, layout), patch_pool(x, layout, "max"))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_layouts(name: str, reduce: str, dtype: torch.dtype) -> None:
    lengths = lengths_of(name)
    check(make_layout(lengths, int(lengths.sum(1).max()) + 2), 37, dtype, reduce)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, reduce: str, dtype: torch.dtype) -> None:
    check(SMALL, width, dtype, reduce)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", REDUCES)
def test_one_patch_of_16k_bytes(reduce: str, dtype: torch.dtype) -> None:
    check(make_layout(torch.tensor(HUGE_PATCH)), 70, dtype, reduce)


@given(lengths=ragged_lengths(), width=st.integers(0, 70), padding=st.integers(0, 3), data=st.data())
def test_any_layout(lengths: torch.Tensor, width: int, padding: int, data: st.DataObject) -> None:
    reduce, dtype = data.draw(st.sampled_from(REDUCES)), data.draw(st.sampled_from(FLOAT_DTYPES))
    layout = make_layout(lengths, int(lengths.sum(1).max()) + padding)
    check(layout, width, dtype, reduce)


@pytest.mark.parametrize("reduce", REDUCES)
def test_packed_sequences_and_left_padding(reduce: str) -> None:
    cu_seqlens = torch.tensor([0, 5, 5, 12])
    check(
        PatchLayout.from_lengths(torch.tensor([[2, 3, 1, 0, 6]]), 14, cu_seqlens=cu_seqlens), 24, torch.float32, reduce
    )
    starts = torch.tensor([[False, False, True, False, True, True], [True, False, False, False, True, False]])
    check(PatchLayout.from_starts(starts, capacity=4), 24, torch.float32, reduce)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize(
    "batch, num_bytes, lengths, width",
    [
        (0, 4, torch.zeros(0, 2, dtype=torch.long), 3),
        (2, 0, torch.zeros(2, 3, dtype=torch.long), 3),
        (2, 4, torch.zeros(2, 0, dtype=torch.long), 3),
        (2, 4, torch.full((2, 2), 2), 0),
    ],
)
def test_empty_tensors(batch: int, num_bytes: int, lengths: torch.Tensor, width: int, reduce: str) -> None:
    layout = PatchLayout.from_lengths(lengths, num_bytes, seq_lens=lengths.sum(1))
    x = torch.ones(batch, num_bytes, width, requires_grad=True)
    out = patch_pool(x, layout, reduce)
    assert out.shape == (batch, lengths.shape[1], width)
    assert not out.any()
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert not x.grad.any()


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_ties_share_the_gradient_equally(reduce: str) -> None:
    layout = make_layout(torch.tensor([[4, 2]]))
    x = torch.tensor([3.0, 3.0, 3.0, 1.0, -0.0, 0.0]).view(1, 6, 1)
    _, grad = value_and_grad(patch_pool, x if reduce == "max" else -x, layout, reduce, torch.tensor([[[6.0], [4.0]]]))
    assert grad.flatten().tolist() == [2, 2, 2, 0, 2, 2]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("rows", [3, 100])  # two code paths
@pytest.mark.parametrize("reduce", REDUCES)
def test_nan_and_infinity(reduce: str, rows: int, dtype: torch.dtype) -> None:
    """As in torch's own reductions NaN wins; its patch's max and min have gradient NaN, and other patches see none."""
    layout = make_layout(torch.tensor([[2, rows, 2]]))
    x = torch.randn(1, rows + 4, 40).to(dtype)
    x[0, 3, 0] = NAN
    x[0, 3, 1], x[0, 4, 1] = INF, -INF
    x[0, 3:5, 2] = INF
    x[0, 2 : 2 + rows, 3] = -INF
    grad = torch.randn(1, 3, 40).to(dtype)
    out, grad_x = value_and_grad(patch_pool, x, layout, reduce, grad)
    expected, expected_grad = value_and_grad(loop, x.double(), layout, reduce, grad)
    torch.testing.assert_close(out, expected.to(dtype), equal_nan=True)
    torch.testing.assert_close(grad_x, expected_grad.to(dtype), equal_nan=True)
    if reduce in ("max", "min"):
        assert grad_x[0, 2 : 2 + rows, 0].isnan().all()
    assert out[0, [0, 2]].isfinite().all()
    assert grad_x[0, [0, 1, -2, -1]].isfinite().all()


@pytest.mark.parametrize("reduce", REDUCES)
def test_nan_outside_every_patch_is_not_seen(reduce: str) -> None:
    layout = make_layout(torch.tensor([[2, 3]]), 9)
    x = torch.randn(1, 9, 20)
    x[0, 5:] = NAN
    out, grad = value_and_grad(patch_pool, x, layout, reduce, torch.ones(1, 2, 20))
    assert out.isfinite().all()
    assert not grad[0, 5:].any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("reduce", REDUCES)
def test_every_output_is_written(poisoned_memory: None, reduce: str, dtype: torch.dtype) -> None:
    for name in RAGGED:
        layout = make_layout(lengths_of(name), int(lengths_of(name).sum(1).max()) + 3)
        x = torch.randn(layout.offsets.shape[0], layout.num_bytes, 21).to(dtype)
        out, grad = value_and_grad(patch_pool, x, layout, reduce, torch.ones(*layout.offsets.diff().shape, 21))
        assert out.isfinite().all()
        assert grad.isfinite().all()
        assert not grad[layout.patch_ids < 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_outputs_too_large_for_caches(poisoned_memory: None, reduce: str, dtype: torch.dtype) -> None:
    """Gradients of 32 MB and more are written by other instructions."""
    width = 2**20 // dtype.itemsize
    layout = make_layout(torch.tensor([[3, 0, 20, 4], [1, 1, 1, 0]]), 33)
    x = torch.randn(2, 33, width).to(dtype)
    grad = torch.randn(2, 4, width).to(dtype)
    _, grad_x = value_and_grad(patch_pool, x, layout, reduce, grad)
    columns = slice(width - 64, width)
    _, expected = value_and_grad(patch_pool, x[:, :, columns], layout, reduce, grad[:, :, columns])
    assert torch.equal(grad_x[:, :, columns], expected)
    assert grad_x.isfinite().all()
    share = grad_x.float().sum(1)  # every row's gradient adds up to that of its patches
    torch.testing.assert_close(share, (grad.float() * (layout.lengths() > 0)[:, :, None]).sum(1), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("reduce", REDUCES)
def test_views(reduce: str) -> None:
    layout = make_layout(lengths_of("typical"))
    x, grad = torch.randn(2, 23, 40), torch.randn(2, 6, 40)
    expected = value_and_grad(patch_pool, x, layout, reduce, grad)
    strided = PatchLayout(**{name: awkward_view(value) for name, value in vars(layout).items()})
    y = awkward_view(x).requires_grad_()
    out = patch_pool(y, strided, reduce)
    assert torch.equal(out, expected[0])
    for g in (awkward_view(grad), grad.mT.contiguous().mT):
        assert torch.equal(torch.autograd.grad(out, y, g, retain_graph=True)[0], expected[1])
    ones = torch.ones(1, 1, 1).expand_as(grad)
    assert torch.equal(
        torch.autograd.grad(out, y, ones)[0], value_and_grad(patch_pool, x, layout, reduce, torch.ones_like(grad))[1]
    )


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize(
    "lengths", [random_lengths(3000, 4.5, batch=3), torch.tensor(HUGE_PATCH)], ids=["mean", "huge"]
)
def test_threads_do_not_change_a_bit(lengths: torch.Tensor, reduce: str) -> None:
    layout = make_layout(lengths)
    x, grad = torch.randn(len(lengths), layout.num_bytes, 72), torch.randn(*lengths.shape, 72)
    assert_same_for_any_threads(lambda: value_and_grad(patch_pool, x, layout, reduce, grad), counts=(1, 2, 3, 7))


def test_sums_of_long_patches_are_no_less_accurate_than_torch() -> None:
    """A running fp32 sum of 16k numbers near 1 is off by a few hundred ulps; ours adds sums of 128."""
    layout = make_layout(torch.tensor(HUGE_PATCH))
    x = torch.rand(1, layout.num_bytes, 64)
    exact = x.double()[0, 3:-2].sum(0)
    ours = patch_pool(x, layout, "sum")[0, 1]
    assert (ours - exact).abs().max() <= 16 * 2**-24 * exact.max()


@pytest.mark.parametrize("reduce", REDUCES)
def test_reference_backend_agrees(reduce: str) -> None:
    layout = make_layout(lengths_of("unequal_rows"))
    x, grad = torch.randn(3, 14, 6), torch.randn(3, 4, 6)
    ours = value_and_grad(patch_pool, x, layout, reduce, grad)
    with use_backend("reference"):
        theirs = value_and_grad(patch_pool, x, layout, reduce, grad)
    definition = value_and_grad(reference.patch_pool, x, layout, reduce, grad)
    torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(theirs, definition, strict=True))


@pytest.mark.parametrize("reduce", REDUCES)
def test_gradcheck(reduce: str) -> None:
    layout = make_layout(lengths_of("unequal_rows"), 16)
    x = torch.randn(3, 16, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: patch_pool(x, layout, reduce), x)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x: patch_pool(x, layout, reduce), x)


def test_second_derivative_is_refused() -> None:
    x = torch.randn(1, 5, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(
        patch_pool(x, make_layout(torch.tensor([[2, 3]]))).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="patch_pool has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", REDUCES)
def test_opcheck(reduce: str, dtype: torch.dtype) -> None:
    layout = make_layout(lengths_of("unequal_rows"), 16)
    x = torch.randn(3, 16, 8).to(dtype)
    opcheck("patch_pool", (x.clone().requires_grad_(), layout.offsets, reduce))
    out = patch_pool(x, layout, reduce)
    values = (x, out) if reduce in ("max", "min") else (None, None)
    opcheck("patch_pool_backward", (torch.randn_like(out), layout.offsets, *values, 16, reduce))


def test_compiles_once_for_every_raggedness() -> None:
    def step(x: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        return patch_pool(2 * x, layout).square()

    compiled = torch.compile(step, fullgraph=True)
    with assert_no_recompile():
        for seed in range(5):
            lengths = torch.zeros(2, 30, dtype=torch.long)
            drawn = random_lengths(60, 5.0, batch=2, seed=seed)
            lengths[:, : drawn.shape[1]] = drawn
            layout = make_layout(lengths)
            x = torch.randn(2, 60, 16, requires_grad=True)
            out, expected = compiled(x, layout), step(x, layout)
            torch.testing.assert_close(out, expected)
            grads = [torch.autograd.grad(y.sum(), x)[0] for y in (out, expected)]
            torch.testing.assert_close(*grads)


def test_compiles_once_for_every_size() -> None:
    compiled = torch.compile(
        lambda x, layout: patch_pool(x, layout, "mean"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with assert_no_recompile():
        for num_bytes in (20, 33, 47):
            layout = make_layout(random_lengths(num_bytes, 3.0, batch=2))
            x = torch.randn(2, num_bytes, 8, requires_grad=True)
            out = compiled(x, layout)
            torch.testing.assert_close(out, patch_pool(x, layout, "mean"))
            out.sum().backward()
            torch.testing.assert_close(x.grad.sum(), 8.0 * (layout.lengths() > 0).sum())


def test_inference_meta_and_autocast() -> None:
    layout = make_layout(lengths_of("typical"))
    x = torch.randn(2, 23, 8)
    with torch.inference_mode():
        assert torch.equal(patch_pool(x, layout), patch_pool(x.clone(), layout))
    meta = PatchLayout(**{name: value.to("meta") for name, value in vars(layout).items()})
    out = patch_pool(x.to("meta").requires_grad_(), meta)
    assert out.device.type == "meta"
    assert out.shape == (2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert patch_pool(x, layout).dtype == torch.float32
        assert patch_pool(x.bfloat16(), layout).dtype == torch.bfloat16


@pytest.mark.parametrize("capability", CPU_CAPABILITIES)
def test_every_processor(capability: str) -> None:
    run_with_capability("import test_patch_pool; test_patch_pool.check_everything()", capability)


LAYOUT = make_layout(torch.tensor([[2, 3], [1, 4]]))
X = torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((None, LAYOUT), TypeError, "patch_pool: x: expected a torch.Tensor, got NoneType"),
        (
            (X.int(), LAYOUT),
            TypeError,
            "patch_pool: x: expected dtype float32 or float64 or bfloat16 or float16, got int32",
        ),
        ((X.to_sparse(), LAYOUT), TypeError, r"patch_pool: x: expected a dense \(strided\) tensor"),
        ((X[0], LAYOUT), ValueError, r"patch_pool: x: expected 3 dimensions, got shape \(5, 4\)"),
        ((X[:, :4], LAYOUT), ValueError, r"patch_pool: x: expected shape \(2, 5, \*\), got shape \(2, 4, 4\)"),
        ((X[:1], LAYOUT), ValueError, r"patch_pool: x: expected shape \(2, 5, \*\), got shape \(1, 5, 4\)"),
        ((X, LAYOUT.offsets), TypeError, "patch_pool: layout: expected a PatchLayout, got Tensor"),
        (
            (X.to("meta"), LAYOUT),
            ValueError,
            r"patch_pool: layout.offsets: expected device meta \(where x is\), got device cpu",
        ),
        (
            (X, LAYOUT, "median"),
            ValueError,
            "patch_pool: reduce: expected one of 'max', 'mean', 'min', 'sum', got 'median'",
        ),
    ],
)
def test_wrong_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patch_pool(*arguments)


def offsets(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X[0], LAYOUT.offsets, "max"), "patch_pool: x: expected 3 dimensions, got 2"),
        ((X.int(), LAYOUT.offsets, "max"), "patch_pool: x: expected dtype float32"),
        ((X, LAYOUT.offsets[0], "max"), "patch_pool: offsets: expected 2 dimensions, got 1"),
        ((X, LAYOUT.offsets[:1], "max"), "patch_pool: offsets: expected size 2 in dimension 0, got 1"),
        ((X, LAYOUT.offsets.long(), "max"), "patch_pool: offsets: expected dtype int32"),
        ((X, LAYOUT.offsets[:, :0], "max"), r"patch_pool: offsets: expected shape \[B, C\+1\]"),
        ((X, LAYOUT.offsets, "median"), "patch_pool: reduce: expected max, mean, min or sum, got median"),
        (
            (X, offsets([0, 2, 5], [0, 3, 2]), "max"),
            "offsets: expected values that never decrease.* got 2 after 3 in row 1",
        ),
        ((X, offsets([-1, 2, 5], [0, 3, 5]), "max"), "offsets: expected values .* got -1 after 0 in row 0"),
        ((X, offsets([0, 2, 5], [0, 3, 6]), "max"), "offsets: expected values .* from 0 to 5, got 6 after 3 in row 1"),
    ],
)
def test_backstop_of_the_raw_op(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.blt_kernels.patch_pool(*arguments)


OUT = torch.zeros(2, 2, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((OUT[0], LAYOUT.offsets, X, OUT, 5, "max"), "patch_pool_backward: grad: expected 3 dimensions, got 2"),
        ((OUT, LAYOUT.offsets, None, None, 5, "max"), "patch_pool_backward: x, out: expected tensors for reduce = max"),
        (
            (OUT, LAYOUT.offsets, X[:, :4], OUT, 5, "max"),
            "patch_pool_backward: x: expected size 5 in dimension 1, got 4",
        ),
        (
            (OUT, LAYOUT.offsets, X, OUT[:, :1], 5, "max"),
            "patch_pool_backward: out: expected size 2 in dimension 1, got 1",
        ),
        ((OUT, LAYOUT.offsets, X.double(), OUT, 5, "max"), "patch_pool_backward: x: expected the dtype of grad"),
        ((OUT, LAYOUT.offsets[:, :2], None, None, 5, "sum"), "offsets: expected size 3 in dimension 1, got 2"),
        ((OUT, LAYOUT.offsets, None, None, -1, "sum"), "num_bytes: expected at least 0, got -1"),
        ((OUT, LAYOUT.offsets, None, None, 4, "sum"), "offsets: expected values .* from 0 to 4, got 5"),
    ],
)
def test_backstop_of_the_raw_backward(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.blt_kernels.patch_pool_backward(*arguments)


def test_a_huge_patch_is_not_one_threads_work() -> None:
    """Threads share its columns: with as many threads as strips, no strip is missed and none is written twice."""
    layout = make_layout(torch.tensor([[5, 2000]]))
    x = torch.randn(1, 2005, 130, requires_grad=True)
    with num_threads(3):
        out = patch_pool(x, layout, "sum")
        out.sum().backward()
    torch.testing.assert_close(out, loop(x.detach(), layout, "sum"), rtol=1e-4, atol=1e-3)
    assert (x.grad == 1).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_nan_in_no_patch_has_no_gradient(reduce, backend):
    layout = PatchLayout.from_lengths(torch.tensor([[2]]), 4, seq_lens=torch.tensor([2]))
    x = torch.tensor([[[1.0], [2.0], [torch.nan], [5.0]]], requires_grad=True)
    with use_backend(backend):
        (grad,) = torch.autograd.grad(patch_pool(x, layout, reduce).sum(), x)
    assert grad.flatten().tolist() == ([0, 1, 0, 0] if reduce == "max" else [0.5, 0.5, 0, 0])
