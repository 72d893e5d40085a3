"""entropy: values, gradients, special values, and rows that do not depend on what surrounds them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    CPU_CAPABILITIES,
    FLOAT_DTYPES,
    assert_as_accurate,
    assert_no_recompile,
    assert_same_for_any_threads,
    awkward_view,
    opcheck,
    run_with_capability,
)
from hypothesis import given
from hypothesis import strategies as st

import blt_kernels as bk
from blt_kernels import reference

# Around every vector length and block of the kernels, the vocabularies of byte models, and a large one.
VOCABULARIES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 65, 255, 256, 260, 512, 1025]
LARGE_VOCABULARY = 32000
INF, NAN = math.inf, math.nan


def with_gradient(fn, logits, grad):
    """fn(logits) and the gradient of (fn(logits) * grad).sum()."""
    x = logits.detach().clone().requires_grad_()
    out = fn(x)
    out.backward(grad.to(out.dtype))
    return out.detach(), x.grad


@pytest.mark.parametrize(
    "logits, entropy",
    [
        ([0.0, math.log(3.0)], math.log(4) - 0.75 * math.log(3)),
        ([2.0, 2.0, 2.0, 2.0, 2.0], math.log(5)),
        ([0.0, -INF, 0.0, -INF], math.log(2)),
        ([1e30, 1e30, -1e30], math.log(2)),
        ([-3e38, -3e38], math.log(2)),
    ],
)
def test_golden_values(logits, entropy):
    torch.testing.assert_close(bk.entropy(torch.tensor(logits)), torch.tensor(entropy), rtol=2e-7, atol=0)


@pytest.mark.parametrize("vocab", [*VOCABULARIES, LARGE_VOCABULARY])
def test_equal_logits_give_ln_v(vocab):
    h = bk.entropy(torch.full((2, vocab), -7.5))
    torch.testing.assert_close(h, torch.full((2,), math.log(vocab)), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 260, 1000])
def test_certainty_is_exactly_plus_zero(vocab, dtype):
    for lead in (1000.0, 60000.0, INF):
        x = torch.where(torch.eye(vocab, dtype=torch.bool), 0.0, -lead).to(dtype)
        h = bk.entropy(x)
        assert (h == 0).all() and not h.signbit().any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_accuracy(vocab, dtype):
    for scale in (0.1, 1.0, 4.0, 30.0):
        # Enough rows that the largest error of each side is not luck.
        check_accuracy(rows=max(40, 4096 // vocab), vocab=vocab, dtype=dtype, scale=scale)


def test_accuracy_of_a_large_vocabulary():
    for scale in (0.1, 4.0):
        check_accuracy(rows=4, vocab=LARGE_VOCABULARY, dtype=torch.float32, scale=scale)


def check_accuracy(rows, vocab, dtype, scale):
    logits = (torch.randn(rows, vocab) * scale).to(dtype)
    grad = torch.randn(rows)
    ours = with_gradient(bk.entropy, logits, grad)
    eager = with_gradient(reference.entropy, logits, grad)
    exact = with_gradient(reference.entropy, logits.double(), grad)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_accurate(ours[0], eager[0], exact[0], f"entropy, scale {scale}")
    assert_as_accurate(ours[1], eager[1], exact[1], f"gradient, scale {scale}")


def test_exponential_over_its_whole_range():
    # Two logits d apart, q = 1 - p = e^d / (1 + e^d): H = ln(1 + e^d) - d q and dH/dx = (d p q, -d p q), in closed form
    # because the reference loses e^d beside 1 even in fp64.
    d = -torch.cat([torch.linspace(0, 110, 40001), torch.logspace(-30, 0, 301)])
    h, g = with_gradient(bk.entropy, torch.stack([torch.zeros_like(d), d], dim=1), torch.ones(len(d)))
    x = d.double()
    q = x.exp() / (1 + x.exp())
    exact_h, exact_g = torch.log1p(x.exp()) - x * q, x * (1 - q) * q
    # d / ln 2 is rounded to fp32, so e^d is known to about |d| ulps. ln(1 + e^d) does not see an e^d under 2^-24; the
    # gradient sees it until 2^-126, under which results may be flushed.
    tolerance = (3 + d.abs()) * 2**-23
    assert (h >= 0).all()
    assert ((h - exact_h).abs() <= tolerance * exact_h + 2**-23).all()
    for got, want in ((g[:, 0], exact_g), (g[:, 1], -exact_g)):
        assert ((got - want).abs() <= tolerance * want.abs() + 200 * 2.0**-126).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", [5, 16, 260])
@pytest.mark.parametrize("position", [0, -1])
def test_rows_without_a_softmax_are_nan(vocab, position, dtype):
    logits = torch.randn(5, vocab)
    logits[0, position] = NAN
    logits[1, position] = INF
    logits[2] = -INF
    logits[3, position] = -INF
    logits = logits.to(dtype)
    h, g = with_gradient(bk.entropy, logits, torch.ones(5))
    assert h[:3].isnan().all() and g[:3].isnan().all()
    assert h[3:].isfinite().all() and g[3:].isfinite().all()
    assert g[3, position] == 0


def test_masked_vocabulary():
    logits = torch.randn(3, 300)
    masked = torch.cat([torch.full((3, 17), -INF), logits, torch.full((3, 40), -INF)], dim=1)
    h, g = with_gradient(bk.entropy, logits, torch.ones(3))
    h_masked, g_masked = with_gradient(bk.entropy, masked, torch.ones(3))
    torch.testing.assert_close(h_masked, h, rtol=5e-7, atol=0)
    torch.testing.assert_close(g_masked[:, 17:317], g, rtol=2e-6, atol=1e-8)
    assert (g_masked[:, :17] == 0).all() and (g_masked[:, 317:] == 0).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", [3, 256, 260, 1025])
def test_a_row_does_not_depend_on_its_surroundings(vocab, dtype):
    logits = torch.randn(67, vocab).to(dtype)
    grad = torch.randn(67)
    h, g = with_gradient(bk.entropy, logits, grad)
    for begin, end in ((0, 1), (1, 2), (5, 38), (66, 67)):
        part, part_g = with_gradient(bk.entropy, logits[begin:end], grad[begin:end])
        assert torch.equal(part, h[begin:end]) and torch.equal(part_g, g[begin:end])
    view = awkward_view(logits)
    assert not view.is_contiguous() and torch.equal(bk.entropy(view), h)
    unaligned = torch.empty(67 * vocab + 1, dtype=dtype)[1:].view(67, vocab).copy_(logits)
    assert torch.equal(bk.entropy(unaligned), h)
    assert torch.equal(bk.entropy(logits.T.contiguous().T), h)
    assert torch.equal(bk.entropy(logits.view(1, 67, 1, vocab)), h.view(1, 67, 1))
    assert torch.equal(bk.entropy(logits[0]), h[0])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_threads(dtype):
    logits = torch.randn(501, 260).to(dtype)
    grad = torch.randn(501)
    assert_same_for_any_threads(lambda: with_gradient(bk.entropy, logits, grad))
    h, g = with_gradient(bk.entropy, logits, grad)
    assert h.isfinite().all() and g.isfinite().all()


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    vocab=st.integers(1, 70),
    dtype=st.sampled_from(FLOAT_DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, vocab, dtype, seed):
    logits = (torch.randn(*shape, vocab, generator=torch.Generator().manual_seed(seed)) * 5).to(dtype)
    grad = torch.ones(shape)
    h, g = with_gradient(bk.entropy, logits, grad)
    want_h, want_g = with_gradient(reference.entropy, logits, grad)
    assert h.shape == tuple(shape) and h.is_contiguous() and h.dtype == want_h.dtype
    torch.testing.assert_close(h, want_h, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(g, want_g)
    assert (h >= 0).all() and (h <= math.log(vocab) + 1e-6).all()


def test_gradcheck():
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bk.entropy, logits)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_opcheck(dtype):
    logits = torch.randn(2, 3, 7).to(dtype)
    opcheck("entropy", (logits,))
    opcheck("entropy", (logits.clone().requires_grad_(),))
    opcheck("entropy", (awkward_view(logits),))
    grad = torch.randn(2, 3, dtype=bk.entropy(logits).dtype)
    opcheck("entropy_backward", (grad, logits))
    opcheck("entropy_backward", (grad[:, :1].expand(2, 3), awkward_view(logits)))


def test_double_backward_is_explained():
    logits = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(bk.entropy(logits).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="entropy has no second derivative"):
        grad.sum().backward()


def test_compile():
    compiled = torch.compile(bk.entropy, fullgraph=True, dynamic=True)
    with assert_no_recompile():
        for n in (5, 4, 33, 64):
            logits, grad = torch.randn(2, n, 260), torch.randn(2, n)
            for got, want in zip(
                with_gradient(compiled, logits, grad), with_gradient(bk.entropy, logits, grad), strict=True
            ):
                assert torch.equal(got, want)


def test_autocast_changes_nothing():
    logits = torch.randn(4, 260)
    plain = bk.entropy(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bk.entropy(logits), plain)
        torch.testing.assert_close(reference.entropy(logits), plain, rtol=1e-6, atol=1e-6)


def test_inference_mode_and_meta():
    logits = torch.randn(4, 260)
    with torch.inference_mode():
        assert torch.equal(bk.entropy(logits), bk.entropy(logits.clone()))
    for dtype in FLOAT_DTYPES:
        h = bk.entropy(torch.empty(4, 5, 260, dtype=dtype, device="meta"))
        assert h.shape == (4, 5) and h.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_reference_backend_is_twice_differentiable():
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    with bk.use_backend("reference"):
        assert torch.autograd.gradgradcheck(bk.entropy, logits)


@pytest.mark.parametrize(
    "logits, error, message",
    [
        ([1.0], TypeError, r"entropy: logits: expected a torch.Tensor, got list"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, r"entropy: logits: expected dtype .*float32.*, got int64"),
        (torch.zeros(2, 3).to_sparse(), TypeError, r"entropy: logits: expected a dense"),
        (torch.zeros(()), ValueError, r"entropy: logits: expected shape \[..., V\] with V >= 1, got shape \(\)"),
        (torch.zeros(3, 0), ValueError, r"entropy: logits: expected shape \[..., V\] with V >= 1, got shape \(3, 0\)"),
    ],
)
def test_errors(logits, error, message):
    with pytest.raises(error, match=message):
        bk.entropy(logits)


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.zeros(2), torch.zeros(2, 0)), "entropy: logits: expected shape"),
        ((torch.zeros(3), torch.zeros(2, 4)), "entropy: grad: expected size 2 in dimension 0, got 3"),
        ((torch.zeros(2, 1), torch.zeros(2, 4)), "entropy: grad: expected 1 dimensions, got 2"),
        ((torch.zeros(2).double(), torch.zeros(2, 4)), "entropy: grad: expected the dtype of the entropies"),
        ((torch.zeros(2), torch.zeros(2, 4).int()), "entropy: logits: expected dtype float32"),
    ],
)
def test_backstop_errors(args, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.blt_kernels.entropy_backward(*args)


@pytest.mark.parametrize("capability", CPU_CAPABILITIES)
def test_capabilities(capability):
    run_with_capability(
        """
        import test_entropy as t
        for dtype in t.FLOAT_DTYPES:
            for vocab in (5, 260):
                t.test_accuracy(vocab, dtype)
                t.test_certainty_is_exactly_plus_zero(vocab, dtype)
            t.test_rows_without_a_softmax_are_nan(260, -1, dtype)
            t.test_a_row_does_not_depend_on_its_surroundings(260, dtype)
        t.test_exponential_over_its_whole_range()
        """,
        capability,
    )
