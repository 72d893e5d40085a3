import pytest
import torch
from helpers import FLOAT_DTYPES, assert_as_accurate, awkward_view, make_layout, random_lengths
from ptx import any_result
from test_cuda_patch_gather import LAYOUTS, layout_of

from blt_kernels import PatchLayout, reference

REDUCES = ("max", "mean", "min", "sum")


def run(cuda_ops, x, layout, reduce, grad):
    """The result and the gradient of x, by the CUDA kernels."""
    out = cuda_ops.patch_pool(x, layout.offsets, reduce)
    values = (x, out) if reduce in ("max", "min") else (None, None)
    return out, cuda_ops.patch_pool_backward(grad, layout.offsets, *values, x.shape[1], reduce)


def run_reference(x, layout, reduce, grad, dtype):
    leaf = x.detach().to(dtype).requires_grad_()
    out = reference.patch_pool(leaf, layout, reduce)
    return out.detach(), torch.autograd.grad(out, leaf, grad.to(dtype))[0]


def check(cuda_ops, x, layout, reduce, grad):
    ours = run(cuda_ops, x, layout, reduce, grad)
    eager = run_reference(x, layout, reduce, grad, x.dtype)
    exact = run_reference(x, layout, reduce, grad, torch.float64)
    for name, *three in zip(("out", "grad_x"), ours, eager, exact, strict=True):
        assert_as_accurate(*three, name)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(cuda_ops, name, dtype, reduce):
    layout = layout_of(name)
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (layout.offsets.shape[0], layout.num_bytes, 24)).to(dtype)  # many ties
    grad = torch.randn(x.shape[0], layout.capacity, x.shape[2], dtype=dtype)
    check(cuda_ops, x, layout, reduce, grad)


@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("width", [1, 7, 8, 256, 264, 768, 1000, 2050])
def test_widths(cuda_ops, width, reduce):
    layout = make_layout(random_lengths(150, 6.0, 2))
    torch.manual_seed(1)
    x, grad = torch.randn(2, 150, width), torch.randn(2, layout.capacity, width)
    check(cuda_ops, x, layout, reduce, grad)


# A tile has 64 bytes plus slots, a batch of rows in registers has 8.
LONG_PATCHES = {
    "around_a_tile": [64, 65, 1, 0, 0, 200, 63, 128, 0, 1],
    "begins_with_the_last_place_of_a_tile": [63, 70, 3],
    "ends_with_a_tile": [62, 127, 0, 2],
    "follow_each_other": [65, 65, 65, 129, 300],
    "around_a_batch": [7, 8, 9, 15, 16, 17, 56, 57],
    "after_empty_slots": [0] * 70 + [70] + [0] * 63 + [1],
}


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", LONG_PATCHES)
def test_long_patches(cuda_ops, name, dtype, reduce):
    layout = make_layout(torch.tensor([LONG_PATCHES[name], LONG_PATCHES[name][::-1]]), sum(LONG_PATCHES[name]) + 3)
    torch.manual_seed(2)
    x = torch.randint(-9, 10, (2, layout.num_bytes, 16)).to(dtype)
    x[0, 70:90] = 9.0
    check(cuda_ops, x, layout, reduce, torch.randn(2, layout.capacity, 16, dtype=dtype))


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_that_is_one_patch(cuda_ops, dtype, reduce):
    layout = make_layout(torch.tensor([[16384]]))
    torch.manual_seed(3)
    x, grad = torch.randint(-3, 4, (1, 16384, 24)).to(dtype), torch.randn(1, 1, 24, dtype=dtype)
    check(cuda_ops, x, layout, reduce, grad)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_long_patches_of_narrow_rows(cuda_ops, dtype, reduce):
    """Rows of which an access of 16 bytes would take more than one."""
    layout = make_layout(torch.tensor([[64, 65, 1, 0, 200, 3]]), 340)
    torch.manual_seed(2)
    x = torch.randint(-3, 4, (1, 340, 5)).to(dtype)
    grad = torch.randn(1, layout.capacity, 5, dtype=dtype)
    check(cuda_ops, x, layout, reduce, grad)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_empty_slots_alone(cuda_ops, dtype, reduce):
    x, offsets = torch.randn(2, 70, 16, dtype=dtype), torch.zeros(2, 301, dtype=torch.int32)
    offsets[1] = 70
    x[0, 3] = torch.nan
    out = cuda_ops.patch_pool(x, offsets, reduce)
    assert out.shape == (2, 300, 16) and (out == 0).all() and not torch.signbit(out).any()
    values = (x, out) if reduce in ("max", "min") else (None, None)
    grad_x = cuda_ops.patch_pool_backward(torch.full_like(out, torch.nan), offsets, *values, 70, reduce)
    assert grad_x.shape == x.shape and (grad_x == 0).all()


@pytest.mark.parametrize("width", [16, 17])
@pytest.mark.parametrize("length", [5, 20, 100])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("reduce", ["max", "min"])
def test_zeros_of_both_signs_tie(cuda_ops, reduce, dtype, length, width):
    layout = make_layout(torch.tensor([[length]]))
    x = torch.zeros(1, length, width, dtype=dtype)
    x[0, ::2] = -0.0
    out, grad_x = run(cuda_ops, x, layout, reduce, torch.ones(1, 1, width, dtype=dtype))
    assert (out == 0).all()
    assert torch.equal(grad_x, torch.full_like(x, 1 / length))


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_unaligned_rows_give_the_same_bits(cuda_ops, dtype, reduce):
    layout = make_layout(torch.tensor([[3, 8, 1, 40, 100, 0, 2]]))
    torch.manual_seed(4)
    x, grad = torch.randn(1, layout.num_bytes, 16, dtype=dtype), torch.randn(1, 7, 16, dtype=dtype)
    x[0, 5] = x[0, 6]
    unaligned = torch.empty(x.numel() + 1, dtype=dtype)[1:].view_as(x).copy_(x)
    for one, other in zip(
        run(cuda_ops, x, layout, reduce, grad), run(cuda_ops, unaligned, layout, reduce, grad), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("lengths", [[[2, 3]], [[2, 30]], [[2, 100]]])
def test_nan_wins(cuda_ops, lengths, dtype, reduce):
    layout = make_layout(torch.tensor(lengths))
    x = torch.randn(1, layout.num_bytes, 8, dtype=dtype)
    x[0, 3, 1] = torch.nan
    x[0, 4, 2], x[0, 2, 3] = torch.inf, -torch.inf
    grad = torch.tensor([1.0, 0.0]).to(dtype)[None, :, None].expand(1, 2, 8).contiguous()
    grad[0, 1, 2:] = 1.0
    pairs = zip(run(cuda_ops, x, layout, reduce, grad), run_reference(x, layout, reduce, grad, x.dtype), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, equal_nan=True)


def test_left_padding_and_many_empty_slots(cuda_ops):
    offsets = torch.cat([torch.tensor([[5, 8, 8, 20]]), torch.full((1, 300), 20)], 1).int()
    starts = torch.zeros(1, 24, dtype=torch.bool)
    layout = PatchLayout.from_starts(starts, capacity=303)
    x, grad = torch.randn(1, 24, 8), torch.randn(1, 303, 8)
    out = cuda_ops.patch_pool(x, offsets, "sum")
    torch.testing.assert_close(out[0, 0], x[0, 5:8].sum(0))
    torch.testing.assert_close(out[0, 2], x[0, 8:20].sum(0))
    assert (out[0, 1] == 0).all() and (out[0, 3:] == 0).all() and not torch.signbit(out[0, 3:]).any()
    grad_x = cuda_ops.patch_pool_backward(grad, offsets, None, None, 24, "sum")
    assert (grad_x[0, :5] == 0).all() and (grad_x[0, 20:] == 0).all()
    assert torch.equal(grad_x[0, 8:20], grad[0, 2].expand(12, 8))
    assert layout.capacity == 303


def test_views(cuda_ops):
    layout = layout_of("typical")
    x = torch.randn(2, layout.num_bytes, 12)
    expected = reference.patch_pool(x, layout, "max")
    assert torch.equal(cuda_ops.patch_pool(awkward_view(x), layout.offsets, "max"), expected)
    assert torch.equal(cuda_ops.patch_pool(x[:, :, 1:], layout.offsets, "max"), expected[:, :, 1:])


@pytest.mark.parametrize("num_bytes", [24, 300])
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize(
    "bad", [[[0, 900, -5, 7], [3, 2, 1, 0]], [[900, 900, 901, 2000]], [[-9, -9, 200, -1]], [[250, 3, 299, 0, 150]]]
)
def test_offsets_of_no_layout_stay_within_x(cuda_ops, bad, reduce, num_bytes):
    """What they give is not defined, but sanitizers see each access outside of the tensors."""
    offsets = torch.tensor(bad, dtype=torch.int32)
    batch, capacity = offsets.shape[0], offsets.shape[1] - 1
    x, grad = torch.randn(batch, num_bytes, 8), torch.randn(batch, capacity, 8)
    with any_result():
        out = cuda_ops.patch_pool(x, offsets, reduce)
        assert out.shape == grad.shape
        values = (x, out) if reduce in ("max", "min") else (None, None)
        assert cuda_ops.patch_pool_backward(grad, offsets, *values, num_bytes, reduce).shape == x.shape


@pytest.mark.parametrize(
    ("batch", "num_bytes", "capacity", "width"), [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (2, 4, 2, 0)]
)
def test_no_elements(cuda_ops, batch, num_bytes, capacity, width):
    x, offsets = torch.randn(batch, num_bytes, width), torch.zeros(batch, capacity + 1, dtype=torch.int32)
    out = cuda_ops.patch_pool(x, offsets, "max")
    assert out.shape == (batch, capacity, width) and (out == 0).all()
    grad = cuda_ops.patch_pool_backward(torch.randn_like(out), offsets, x, out, num_bytes, "max")
    assert grad.shape == x.shape and (grad == 0).all()
