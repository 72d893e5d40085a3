import pytest
import torch
from helpers import FLOAT_DTYPES, assert_as_accurate, awkward_view

from blt_kernels import reference


def run_reference(hidden, weight, grad, dtype):
    h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    out = reference.linear_entropy(h, w)
    return out.detach(), *torch.autograd.grad(out, (h, w), grad.to(out.dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("rows", "width", "vocab"), [((7,), 16, 260), ((2, 9), 33, 5), ((), 8, 3), ((11,), 4, 600)])
def test_accuracy(cuda_ops, rows, width, vocab, dtype):
    hidden, weight = torch.randn(*rows, width, dtype=dtype), torch.randn(vocab, width, dtype=dtype) / 2
    exact_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.randn(rows, dtype=exact_dtype)
    ours = cuda_ops.linear_entropy(hidden, weight), *cuda_ops.linear_entropy_backward(grad, hidden, weight, True, True)
    eager = run_reference(hidden, weight, grad, dtype)
    exact = run_reference(hidden, weight, grad, torch.float64)
    for name, *three in zip(("entropy", "grad_hidden", "grad_weight"), ours, eager, exact, strict=True):
        assert_as_accurate(*three, name)


def test_several_chunks(cuda_ops):
    hidden, weight = torch.randn(5, 3), torch.randn(1 << 20, 3)  # 4 rows a chunk
    grad = torch.randn(5)
    ours = cuda_ops.linear_entropy(hidden, weight), *cuda_ops.linear_entropy_backward(grad, hidden, weight, True, True)
    eager, exact = (run_reference(hidden, weight, grad, dtype) for dtype in (torch.float32, torch.float64))
    for name, *three in zip(("entropy", "grad_hidden", "grad_weight"), ours, eager, exact, strict=True):
        assert_as_accurate(*three, name)


def test_what_is_not_needed_mixed_dtypes_and_views(cuda_ops):
    hidden, weight = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(20, 8)
    expected = reference.linear_entropy(hidden, weight)
    torch.testing.assert_close(cuda_ops.linear_entropy(awkward_view(hidden), awkward_view(weight)), expected)
    grad_hidden, grad_weight = cuda_ops.linear_entropy_backward(torch.randn(6), hidden, weight, False, True)
    assert grad_hidden.numel() == 0 and grad_weight.dtype == torch.float32
    grad_hidden, grad_weight = cuda_ops.linear_entropy_backward(torch.randn(6), hidden, weight, True, False)
    assert grad_weight.numel() == 0 and grad_hidden.dtype == torch.bfloat16
    assert cuda_ops.linear_entropy(hidden[:0], weight).shape == (0,)
