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
@pytest.mark.parametrize("width", [1, 7, 8, 264, 2050])
def test_widths(cuda_ops, width, reduce):
    layout = make_layout(random_lengths(150, 6.0, 2))
    torch.manual_seed(1)
    x, grad = torch.randn(2, 150, width), torch.randn(2, layout.capacity, width)
    check(cuda_ops, x, layout, reduce, grad)


@pytest.mark.parametrize("reduce", REDUCES)
def test_long_patches(cuda_ops, reduce):
    lengths = torch.tensor([[64, 65, 1, 0, 0, 200, 63, 128, 0, 1]])
    layout = make_layout(lengths, 600)
    torch.manual_seed(2)
    x, grad = torch.randn(1, 600, 16), torch.randn(1, layout.capacity, 16)
    x[0, 70:90] = 5.0
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


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("lengths", [[[2, 3]], [[2, 100]]])
def test_nan_wins(cuda_ops, lengths, reduce):
    layout = make_layout(torch.tensor(lengths))
    x = torch.randn(1, layout.num_bytes, 8)
    x[0, 3, 1] = torch.nan
    grad = torch.ones(1, 2, 8)
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


def test_views_and_bad_offsets(cuda_ops):
    layout = layout_of("typical")
    x = torch.randn(2, layout.num_bytes, 12)
    expected = reference.patch_pool(x, layout, "max")
    assert torch.equal(cuda_ops.patch_pool(awkward_view(x), layout.offsets, "max"), expected)
    assert torch.equal(cuda_ops.patch_pool(x[:, :, 1:], layout.offsets, "max"), expected[:, :, 1:])
    bad = torch.tensor([[0, 900, -5, 7], [3, 2, 1, 0]], dtype=torch.int32)  # no layout: must stay within x
    with any_result():
        assert cuda_ops.patch_pool(x, bad, "sum").shape == (2, 3, 12)
        assert cuda_ops.patch_pool_backward(torch.randn(2, 3, 12), bad, None, None, x.shape[1], "sum").shape == x.shape


@pytest.mark.parametrize(
    ("batch", "num_bytes", "capacity", "width"), [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (2, 4, 2, 0)]
)
def test_no_elements(cuda_ops, batch, num_bytes, capacity, width):
    x, offsets = torch.randn(batch, num_bytes, width), torch.zeros(batch, capacity + 1, dtype=torch.int32)
    out = cuda_ops.patch_pool(x, offsets, "max")
    assert out.shape == (batch, capacity, width) and (out == 0).all()
    grad = cuda_ops.patch_pool_backward(torch.randn_like(out), offsets, x, out, num_bytes, "max")
    assert grad.shape == x.shape and (grad == 0).all()
