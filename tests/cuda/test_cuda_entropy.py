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
@pytest.mark.parametrize("vocab", [1, 2, 5, 7, 127, 256, 257, 260, 511, 512, 513, 1000, 1300])
def test_accuracy(cuda_ops, vocab, dtype):
    torch.manual_seed(vocab)
    for scale in (0.1, 4.0, 30.0):
        check(cuda_ops, (torch.randn(40, vocab) * scale).to(dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("first", [0, 256, 512])
def test_every_length_of_some_rows(cuda_ops, first, dtype):
    """Lengths that have kernels of their own, and their neighbours; in more rows than one warp takes."""
    torch.manual_seed(0)
    for vocab in range(max(1, first - 4), first + 36):
        logits, grad = 3 * torch.randn(9, vocab).to(dtype), torch.randn(9)
        grad = grad.double() if dtype == torch.float64 else grad
        out, gradient = cuda_ops.entropy(logits), cuda_ops.entropy_backward(grad, logits)
        torch.testing.assert_close(out, torch.ops.blt_kernels.entropy(logits), rtol=1e-4, atol=1e-5)
        expected = torch.ops.blt_kernels.entropy_backward(grad, logits)
        torch.testing.assert_close(gradient, expected, rtol=1e-2 if logits.element_size() == 2 else 1e-4, atol=1e-5)


def test_exponential_over_its_whole_range(cuda_ops):
    # As on the CPU: two logits d apart, and q = 1 - p = e^d / (1 + e^d), so that H = ln(1 + e^d) - d q in closed form.
    d = -torch.cat([torch.linspace(0, 110, 1001), torch.logspace(-30, 0, 31)])
    logits = torch.stack([torch.zeros_like(d), d], dim=1)
    h, g = cuda_ops.entropy(logits), cuda_ops.entropy_backward(torch.ones(len(d)), logits)
    x = d.double()
    q = x.exp() / (1 + x.exp())
    exact_h, exact_g = torch.log1p(x.exp()) - x * q, x * (1 - q) * q
    tolerance = (3 + d.abs()) * 2**-23  # docs/numerics.md: two ulps, and the rounding of d / ln 2
    assert (h >= 0).all()
    assert ((h - exact_h).abs() <= tolerance * exact_h + 2**-23).all()
    for got, want in ((g[:, 0], exact_g), (g[:, 1], -exact_g)):
        assert ((got - want).abs() <= tolerance * want.abs() + 200 * 2.0**-126).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 260, 1300])
def test_certainty_is_exactly_plus_zero(cuda_ops, vocab, dtype):
    for lead in (1000.0, 60000.0, INF):
        logits = torch.where(torch.eye(8, vocab, dtype=torch.bool), 0.3, 0.3 - lead)[: min(8, vocab)].to(dtype)
        h = cuda_ops.entropy(logits)
        assert (h == 0).all() and not h.signbit().any()
        assert (cuda_ops.entropy_backward(torch.ones_like(h), logits) == 0).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", [7, 256, 260, 1300])
def test_special_rows(cuda_ops, vocab, dtype):
    logits = torch.randn(7, vocab).to(dtype)
    logits[0, 3] = NAN
    logits[1, -1] = INF
    logits[2] = -INF
    logits[3, : vocab - 1] = -INF
    logits[4, ::2] = -INF
    logits[5, : min(vocab - 1, 1100)] = -INF  # whole chunks of masked logits
    logits[6, 0], logits[6, 1] = torch.finfo(dtype).max, torch.finfo(dtype).min  # whose distance overflows
    eager, exact = (run_reference(logits, torch.ones(7), t) for t in (dtype, torch.float64))
    out = cuda_ops.entropy(logits)
    grad = cuda_ops.entropy_backward(torch.ones_like(out), logits)
    assert out[:3].isnan().all() and grad[:3].isnan().all()
    assert out[3] == 0 and (grad[3] == 0).all()
    assert (grad[4, ::2] == 0).all()
    assert out[6] == 0 and (grad[6] == 0).all()
    torch.testing.assert_close(out[3:6].double(), exact[0][3:6], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[3:6], eager[1][3:6].nan_to_num())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 256, 260, 261, 512, 513, 1000, 1400])
def test_a_row_does_not_depend_on_its_place(cuda_ops, vocab, dtype):
    logits, grad = torch.randn(33, vocab).to(dtype), torch.randn(33)
    grad = grad.to(cuda_ops.entropy(logits).dtype)

    def both(x, g):
        return cuda_ops.entropy(x), cuda_ops.entropy_backward(g, x)

    def assert_rows(got, rows):
        for g, w in zip(got, whole, strict=True):
            assert torch.equal(g, w[rows])

    whole = both(logits, grad)
    for rows in (slice(0, 1), slice(17, 18), slice(0, 31), slice(1, 33)):
        assert_rows(both(logits[rows].clone(), grad[rows].clone()), rows)
    everything = slice(None)
    assert_rows(both(awkward_view(logits), grad), everything)
    shifted = torch.empty(logits.numel() + 1, dtype=dtype)[1:].view_as(logits).copy_(logits)
    assert_rows(both(shifted, grad), everything)  # at an address that is not aligned
    beside = logits.clone()  # rows that need more care do not disturb those beside them
    beside[0, 0], beside[5, -1], beside[8], beside[18, : vocab // 2] = NAN, INF, -INF, -INF
    others = [i for i in range(33) if i not in (0, 5, 8, 18)]
    assert_rows([x[others] for x in both(beside, grad)], others)


def test_no_elements(cuda_ops):
    assert cuda_ops.entropy(torch.randn(0, 260)).shape == (0,)
    assert cuda_ops.entropy_backward(torch.randn(0), torch.randn(0, 260)).shape == (0, 260)
