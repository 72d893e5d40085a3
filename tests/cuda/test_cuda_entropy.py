import math

import pytest
import torch
from helpers import FLOAT_DTYPES, assert_as_accurate, awkward_view

from blt_kernels import reference

INF, NAN = math.inf, math.nan


def run_reference(logits, grad, dtype):
    leaf = logits.detach().to(dtype).requires_grad_()
    out = reference.entropy(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]


def check(cuda_ops, logits):
    grad = torch.randn(logits.shape[:-1], dtype=torch.float64).to(
        torch.float64 if logits.dtype == torch.float64 else torch.float32
    )
    ours = cuda_ops.entropy(logits), cuda_ops.entropy_backward(grad, logits)
    eager = run_reference(logits, grad, logits.dtype)
    exact = run_reference(logits, grad, torch.float64)
    for name, *three in zip(("entropy", "gradient"), ours, eager, exact, strict=True):
        assert_as_accurate(*three, name)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 5, 127, 256, 257, 260, 511, 512, 513, 1300])
def test_accuracy(cuda_ops, vocab, dtype):
    torch.manual_seed(vocab)
    for scale in (0.1, 4.0):
        check(cuda_ops, (torch.randn(20, vocab) * scale).to(dtype))


@pytest.mark.parametrize("vocab", [260, 1300])
def test_special_rows(cuda_ops, vocab):
    logits = torch.randn(6, vocab)
    logits[0, 3] = NAN
    logits[1, -1] = INF
    logits[2] = -INF
    logits[3, : vocab - 1] = -INF
    logits[4, ::2] = -INF
    logits[5, : min(vocab - 1, 700)] = -INF  # whole chunks of masked logits
    expected = run_reference(logits.double(), torch.ones(6), torch.float64)
    out, grad = cuda_ops.entropy(logits), cuda_ops.entropy_backward(torch.ones(6), logits)
    assert out[:3].isnan().all() and grad[:3].isnan().all()
    assert out[3] == 0 and (grad[3] == 0).all()
    torch.testing.assert_close(out[3:].double(), expected[0][3:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[3:].double().nan_to_num(), expected[1][3:].nan_to_num(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab", [260, 261, 600])
def test_a_row_does_not_depend_on_its_place(cuda_ops, vocab):
    logits = torch.randn(37, vocab, dtype=torch.bfloat16)
    whole = cuda_ops.entropy(logits)
    for i in (0, 1, 17, 36):
        assert torch.equal(cuda_ops.entropy(logits[i].clone()), whole[i])
    assert torch.equal(cuda_ops.entropy(awkward_view(logits)), whole)
    shifted = torch.empty(logits.numel() + 1, dtype=logits.dtype)[1:].view_as(logits).copy_(logits)
    assert torch.equal(cuda_ops.entropy(shifted), whole)  # at an address that is not aligned


def test_no_elements(cuda_ops):
    assert cuda_ops.entropy(torch.randn(0, 260)).shape == (0,)
    assert cuda_ops.entropy_backward(torch.randn(0), torch.randn(0, 260)).shape == (0, 260)
