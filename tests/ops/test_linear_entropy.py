"""linear_entropy: values, gradients, rows that do not depend on what surrounds them, and memory."""

from __future__ import annotations

import itertools
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

# Rows, D and V below, at and above the sizes of tiles and blocks.
SHAPES = [
    (1, 1, 1),
    (60, 3, 2),
    (70, 16, 5),
    (49, 33, 260),
    (100, 768, 260),
    (40, 1030, 6),
    (40, 2100, 3),
    (20, 8, 1025),
]


def inputs(rows, width, vocab, dtype=torch.float32, weight_dtype=None):
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(vocab, width) * 3 / math.sqrt(width)).to(weight_dtype or dtype)
    return hidden, weight


def with_gradients(fn, hidden, weight, grad):
    """fn(hidden, weight) and the gradients of (fn(hidden, weight) * grad).sum()."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    out = fn(hidden, weight)
    out.backward(grad.to(out.dtype))
    return out.detach(), hidden.grad, weight.grad


def check_accuracy(hidden, weight):
    grad = torch.randn(hidden.shape[:-1])
    ours = with_gradients(bk.linear_entropy, hidden, weight, grad)
    eager = with_gradients(reference.linear_entropy, hidden, weight, grad)
    exact = with_gradients(reference.linear_entropy, hidden.double(), weight.double(), grad)
    for name, a, b, c in zip(("entropy", "grad hidden", "grad weight"), ours, eager, exact, strict=True):
        assert_as_accurate(a, b, c, name)


def test_golden_values():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    hidden = torch.tensor([[0.0, 0.0], [math.log(2.0), 0.0], [1000.0, 0.0]])
    expected = torch.tensor([math.log(3.0), 1.5 * math.log(2.0), 0.0])  # p = (1, 1, 1) / 3, (2, 1, 1) / 4, (1, 0, 0)
    torch.testing.assert_close(bk.linear_entropy(hidden, weight), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape, dtype):
    check_accuracy(*inputs(*shape, dtype))


@pytest.mark.parametrize("dtypes", list(itertools.permutations(FLOAT_DTYPES, 2)))
def test_mixed_dtypes(dtypes):
    hidden, weight = inputs(9, 40, 11, *dtypes)
    check_accuracy(hidden, weight)
    assert bk.linear_entropy(hidden, weight).dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)


def test_long_sums_over_rows():
    # More rows than a chunk of the backward holds.
    hidden, weight = inputs(2 * 1048 + 5, 24, 1000)
    check_accuracy(hidden, weight)


def test_no_width():
    h = bk.linear_entropy(torch.empty(4, 0), torch.empty(7, 0))
    torch.testing.assert_close(h, torch.full((4,), math.log(7.0)), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(101, 96, 260), (101, 1100, 7)])
def test_a_row_does_not_depend_on_its_surroundings(shape, dtype):
    hidden, weight = inputs(*shape, dtype)
    grad = torch.randn(len(hidden))
    h, g, _ = with_gradients(bk.linear_entropy, hidden, weight, grad)
    for begin, end in ((0, 1), (1, 2), (5, 12), (40, 99), (100, 101)):
        part, part_g, _ = with_gradients(bk.linear_entropy, hidden[begin:end], weight, grad[begin:end])
        assert torch.equal(part, h[begin:end]) and torch.equal(part_g, g[begin:end])
    view, weight_view = awkward_view(hidden), awkward_view(weight)
    assert not view.is_contiguous() and torch.equal(bk.linear_entropy(view, weight_view), h)
    assert torch.equal(bk.linear_entropy(hidden.T.contiguous().T, weight), h)
    unaligned = torch.empty(hidden.numel() + 1, dtype=dtype)[1:].view(hidden.shape).copy_(hidden)
    assert torch.equal(bk.linear_entropy(unaligned, weight), h)
    assert torch.equal(bk.linear_entropy(hidden[None, :, None], weight), h[None, :, None])
    assert torch.equal(bk.linear_entropy(hidden[0], weight), h[0])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_threads(dtype):
    hidden, weight = inputs(1500, 70, 1000, dtype)
    grad = torch.randn(1500)
    assert_same_for_any_threads(lambda: with_gradients(bk.linear_entropy, hidden, weight, grad))
    assert all(t.isfinite().all() for t in with_gradients(bk.linear_entropy, hidden, weight, grad))


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    width=st.integers(0, 40),
    vocab=st.integers(1, 40),
    dtype=st.sampled_from(FLOAT_DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, width, vocab, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    ours = with_gradients(bk.linear_entropy, hidden, weight, torch.ones(shape))
    want = with_gradients(reference.linear_entropy, hidden, weight, torch.ones(shape))
    for a, b in zip(ours, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-4 if dtype in (torch.float32, torch.float64) else 2e-2, rtol=2e-2)
    torch.testing.assert_close(ours[0], want[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_without_a_softmax_are_nan(bad):
    hidden, weight = inputs(9, 20, 12)
    hidden[3, 5] = bad
    h, g, _ = with_gradients(bk.linear_entropy, hidden, weight, torch.ones(9))
    assert h[3].isnan() and g[3].isnan().all()
    rest = [i for i in range(9) if i != 3]
    assert h[rest].isfinite().all() and g[rest].isfinite().all()
    weight[2, 4] = math.nan
    assert bk.linear_entropy(hidden, weight).isnan().all()


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(needs):
    hidden, weight = inputs(6, 8, 5)
    both = with_gradients(bk.linear_entropy, hidden, weight, torch.ones(6))[1:]
    for t, need in zip((hidden, weight), needs, strict=True):
        t.requires_grad_(need)
    bk.linear_entropy(hidden, weight).sum().backward()
    for t, need, want in zip((hidden, weight), needs, both, strict=True):
        assert torch.equal(t.grad, want) if need else t.grad is None


def test_gradcheck():
    hidden, weight = inputs(3, 5, 7, torch.float64)
    assert torch.autograd.gradcheck(bk.linear_entropy, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_opcheck(dtype):
    hidden, weight = inputs(6, 8, 5, dtype)
    opcheck("linear_entropy", (hidden, weight))
    opcheck("linear_entropy", (hidden.clone().requires_grad_(), weight.clone().requires_grad_()))
    grad = torch.randn(6, dtype=bk.linear_entropy(hidden, weight).dtype)
    opcheck("linear_entropy_backward", (grad, hidden, weight, True, True))
    opcheck("linear_entropy_backward", (grad[:1].expand(6), awkward_view(hidden), weight, True, False))
    opcheck("linear_entropy_backward", (grad, hidden, awkward_view(weight), False, True))


def test_double_backward_is_explained():
    hidden, weight = inputs(3, 5, 7)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(bk.linear_entropy(hidden, weight).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_entropy has no second derivative"):
        grad.sum().backward()


def test_compile():
    compiled = torch.compile(bk.linear_entropy, fullgraph=True, dynamic=True)
    _, weight = inputs(1, 16, 260)
    with assert_no_recompile():
        for n in (5, 4, 33, 64):
            hidden, grad = torch.randn(2, n, 16), torch.randn(2, n)
            got = with_gradients(compiled, hidden, weight, grad)
            for a, b in zip(got, with_gradients(bk.linear_entropy, hidden, weight, grad), strict=True):
                assert torch.equal(a, b)


def test_autocast_changes_nothing():
    hidden, weight = inputs(4, 32, 260)
    plain = bk.linear_entropy(hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bk.linear_entropy(hidden, weight), plain)
        torch.testing.assert_close(reference.linear_entropy(hidden, weight), plain, rtol=1e-5, atol=1e-5)


def test_inference_mode_and_meta():
    hidden, weight = inputs(4, 32, 260)
    with torch.inference_mode():
        assert torch.equal(bk.linear_entropy(hidden, weight), bk.linear_entropy(hidden.clone(), weight))
    h = bk.linear_entropy(hidden.to("meta", torch.bfloat16), weight.to("meta"))
    assert h.shape == (4,) and h.dtype == torch.float32


def test_logits_never_reach_memory_whole():
    # 65536 rows of 1024 logits: 256 MB, whose gradient would be as large.
    run_with_capability(
        """
        import resource
        hidden, weight = torch.randn(65536, 4), torch.randn(1024, 4)
        hidden.requires_grad_(), weight.requires_grad_()
        bk = blt_kernels
        bk.linear_entropy(hidden[:100], weight).sum().backward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        bk.linear_entropy(hidden, weight).sum().backward()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < 32, f"{grown} MB"
        """,
        "default",
    )


@pytest.mark.parametrize(
    "args, error, message",
    [
        (([1.0], torch.zeros(2, 1)), TypeError, "linear_entropy: hidden: expected a torch.Tensor, got list"),
        ((torch.zeros(2, 1), None), TypeError, "linear_entropy: weight: expected a torch.Tensor, got NoneType"),
        ((torch.zeros(2, 3).int(), torch.zeros(4, 3)), TypeError, "linear_entropy: hidden: expected dtype"),
        ((torch.zeros(2, 3), torch.zeros(4, 3).long()), TypeError, "linear_entropy: weight: expected dtype"),
        ((torch.zeros(2, 3), torch.zeros(3)), ValueError, "linear_entropy: weight: expected 2 dimensions"),
        ((torch.zeros(2, 3), torch.zeros(0, 3)), ValueError, r"linear_entropy: weight: expected shape \[V, D\]"),
        ((torch.zeros(2, 3), torch.zeros(4, 5)), ValueError, r"linear_entropy: hidden: .* D = 5 .*\(2, 3\)"),
        ((torch.zeros(()), torch.zeros(4, 5)), ValueError, "linear_entropy: hidden: expected shape"),
        ((torch.zeros(2, 3), torch.zeros(4, 3, device="meta")), ValueError, "linear_entropy: weight: expected device"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        bk.linear_entropy(*args)


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.zeros(2), torch.zeros(2, 3), torch.zeros(4, 5)), "linear_entropy: hidden: expected shape"),
        ((torch.zeros(2), torch.zeros(2, 3), torch.zeros(3)), "linear_entropy: weight: expected 2 dimensions, got 1"),
        ((torch.zeros(2), torch.zeros(2, 3), torch.zeros(0, 3)), "linear_entropy: weight: expected shape"),
        ((torch.zeros(3), torch.zeros(2, 3), torch.zeros(4, 3)), "linear_entropy: grad: expected size 2"),
        ((torch.zeros(2, 1), torch.zeros(2, 3), torch.zeros(4, 3)), "linear_entropy: grad: expected 1 dimensions"),
        ((torch.zeros(2).double(), torch.zeros(2, 3), torch.zeros(4, 3)), "linear_entropy: grad: expected the dtype"),
        ((torch.zeros(2), torch.zeros(2, 3).int(), torch.zeros(4, 3)), "linear_entropy: hidden: expected dtype"),
    ],
)
def test_backstop_errors(args, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.blt_kernels.linear_entropy_backward(*args, True, True)


@pytest.mark.parametrize("capability", CPU_CAPABILITIES)
def test_capabilities(capability):
    run_with_capability(
        """
        import test_linear_entropy as t
        for dtype in t.FLOAT_DTYPES:
            t.test_accuracy((49, 33, 260), dtype)
            t.test_accuracy((40, 1030, 6), dtype)
            t.test_a_row_does_not_depend_on_its_surroundings((101, 96, 260), dtype)
        t.test_mixed_dtypes((torch.bfloat16, torch.float64))
        """,
        capability,
    )
