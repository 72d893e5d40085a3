import pytest
import torch
from helpers import FLOAT_DTYPES, RAGGED, assert_as_accurate, awkward_view, lengths_of, make_layout

from blt_kernels import PatchLayout, reference

LAYOUTS = [*RAGGED, "packed", "long"]


def layout_of(name):
    if name == "packed":  # sequences that repeat, and bytes after the last one
        cu_seqlens = torch.tensor([0, 5, 5, 12, 13, 13])
        return PatchLayout.from_lengths(torch.tensor([[1, 4, 2, 0, 5, 1]]), 16, cu_seqlens=cu_seqlens)
    if name == "long":
        return make_layout(torch.tensor([[3, 200, 0, 1, 70, 2], [1, 2, 3, 4, 5, 0]]))
    return make_layout(lengths_of(name))


@pytest.mark.parametrize("which", ["own", "visible"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [1, 3, 8, 40, 300])
@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_and_backward(cuda_ops, name, width, dtype, which):
    layout = layout_of(name)
    ids = layout.patch_ids if which == "own" else layout.visible_ids
    torch.manual_seed(0)
    y = torch.randn(ids.shape[0], layout.capacity, width, dtype=dtype)
    assert torch.equal(cuda_ops.patch_gather(y, ids), reference.patch_gather(y, layout, which))

    grad = torch.randn(*ids.shape, width, dtype=dtype)
    results = []
    for at in (dtype, torch.float64):
        leaf = y.to(at).requires_grad_()
        results.append(torch.autograd.grad(reference.patch_gather(leaf, layout, which), leaf, grad.to(at))[0])
    assert_as_accurate(cuda_ops.patch_gather_backward(grad, ids, layout.capacity), *results)


def test_views_and_bad_ids(cuda_ops):
    layout = layout_of("typical")
    y = torch.randn(2, layout.capacity, 12)
    expected = reference.patch_gather(y, layout, "own")
    assert torch.equal(cuda_ops.patch_gather(awkward_view(y), layout.patch_ids), expected)
    assert torch.equal(cuda_ops.patch_gather(y[:, :, 1:], layout.patch_ids), expected[:, :, 1:])
    ids = layout.patch_ids.clone()
    ids[0, 3], ids[1, 2] = 1000, -7  # clamped: a GPU cannot raise
    got = cuda_ops.patch_gather(y, ids)
    assert torch.equal(got[0, 3], y[0, -1]) and (got[1, 2] == 0).all()


@pytest.mark.parametrize(
    ("batch", "num_bytes", "capacity", "width"), [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (2, 4, 2, 0)]
)
def test_no_elements(cuda_ops, batch, num_bytes, capacity, width):
    y, ids = torch.randn(batch, capacity, width), torch.full((batch, num_bytes), -1, dtype=torch.int32)
    out = cuda_ops.patch_gather(y, ids)
    assert out.shape == (batch, num_bytes, width) and (out == 0).all()
    grad = cuda_ops.patch_gather_backward(torch.randn_like(out), ids, capacity)
    assert grad.shape == y.shape and (grad == 0).all()
