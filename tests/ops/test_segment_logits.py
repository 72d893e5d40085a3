"""segment_logits: entropy followed by segment, bit for bit, with every option."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.utils._pytree as pytree
from helpers import (
    CPU_CAPABILITIES,
    FLOAT_DTYPES,
    assert_no_recompile,
    assert_same_for_any_threads,
    awkward_view,
    opcheck,
    run_with_capability,
)
from hypothesis import given
from hypothesis import strategies as st

from blt_kernels import entropy, reference, segment, segment_logits, use_backend

RULES = [("threshold", None), ("monotonic", None), ("combined", 0.1)]


def logits_like_text(batch, num_bytes, vocab=260, dtype=torch.float32, seed=0):
    """[B, N, V] whose entropies range from certain to uniform, as an entropy model's do."""
    generator = torch.Generator().manual_seed(seed)
    scale = 8 * torch.rand(batch, num_bytes, 1, generator=generator)
    return (torch.randn(batch, num_bytes, vocab, generator=generator) * scale).to(dtype)


def flat(result):
    return pytree.tree_leaves(result)


def assert_entropy_then_segment(logits, threshold, **options):
    entropies, layout = segment_logits(logits, threshold, **options)
    want = entropy(logits)
    assert entropies.dtype == want.dtype and torch.equal(entropies.nan_to_num(-1), want.nan_to_num(-1))
    for got, expected in zip(flat(layout), flat(segment(want, threshold, **options)), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, expected)
    return entropies, layout


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("rule, delta", RULES)
def test_is_entropy_then_segment(rule, delta, dtype):
    logits = logits_like_text(3, 70, dtype=dtype)
    _, layout = assert_entropy_then_segment(logits, 2.5, rule=rule, delta=delta)
    assert layout.num_patches.min() > 3 and layout.num_patches.max() < 69  # the threshold cuts, and not everywhere


@given(
    rule_delta=st.sampled_from(RULES),
    batch=st.integers(0, 3),
    num_bytes=st.integers(0, 40),
    vocab=st.sampled_from([1, 2, 17, 260]),
    max_patch_length=st.sampled_from([None, 1, 3, 16]),
    bos_patch=st.booleans(),
    capacity=st.sampled_from([None, 1, 5, 64]),
    padded=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_option(rule_delta, batch, num_bytes, vocab, max_patch_length, bos_patch, capacity, padded, seed):
    seq_lens = torch.arange(batch) * num_bytes // max(batch, 1) if padded else None
    assert_entropy_then_segment(
        logits_like_text(batch, num_bytes, vocab, seed=seed),
        math.log(vocab) / 2,
        rule=rule_delta[0],
        delta=rule_delta[1],
        max_patch_length=max_patch_length,
        seq_lens=seq_lens,
        bos_patch=bos_patch,
        capacity=capacity,
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences(dtype):
    cu_seqlens = torch.tensor([0, 1, 1, 20, 50, 50], dtype=dtype)
    _, layout = assert_entropy_then_segment(logits_like_text(1, 60), 2.0, cu_seqlens=cu_seqlens, capacity=30)
    assert (layout.patch_ids[0, 50:] == -1).all()


def test_padded_bytes_have_their_own_entropies():
    logits = logits_like_text(2, 30)
    entropies, layout = segment_logits(logits, 2.0, seq_lens=torch.tensor([30, 11]))
    assert torch.equal(entropies, entropy(logits)) and (layout.patch_ids[1, 11:] == -1).all()


def test_nan_starts_no_patch():
    logits = logits_like_text(1, 20)
    logits[0, 7, 3] = math.nan
    entropies, layout = assert_entropy_then_segment(logits, 0.0)
    assert entropies[0, 7].isnan() and layout.patch_ids[0, 8] == layout.patch_ids[0, 7]


@pytest.mark.parametrize("rule, delta", RULES)
def test_patches_of_a_prefix_are_the_prefix_of_the_patches(rule, delta):
    logits = logits_like_text(1, 200)
    _, whole = segment_logits(logits, 2.5, rule=rule, delta=delta)
    for n in (1, 2, 3, 17, 100, 199):
        _, prefix = segment_logits(logits[:, :n], 2.5, rule=rule, delta=delta)
        assert torch.equal(prefix.patch_ids, whole.patch_ids[:, :n])
        assert torch.equal(prefix.visible_ids, whole.visible_ids[:, :n])


def test_matches_the_reference():
    logits = logits_like_text(2, 300)
    with use_backend("reference"):
        want_entropies, want = segment_logits(logits, 2.5)
    entropies, layout = segment_logits(logits, 2.5)
    torch.testing.assert_close(entropies, want_entropies, rtol=1e-6, atol=1e-6)
    assert ((want_entropies - 2.5).abs() > 1e-5).all(), "an entropy on the threshold decides nothing here"
    assert all(torch.equal(a, b) for a, b in zip(flat(layout), flat(want), strict=True))


def test_views():
    logits = logits_like_text(2, 30)
    want = flat(segment_logits(logits, 2.5))
    for view in (awkward_view(logits), logits.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not view.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(flat(segment_logits(view, 2.5)), want, strict=True))


def test_threads():
    logits = logits_like_text(2, 900)
    assert_same_for_any_threads(lambda: flat(segment_logits(logits, 2.5)))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradient_is_that_of_entropy(dtype):
    logits = logits_like_text(2, 9, dtype=dtype)
    grad = torch.randn(2, 9)
    results = []
    for fn in (entropy, lambda x: segment_logits(x, 2.5)[0]):
        x = logits.clone().requires_grad_()
        fn(x).backward(grad.to(entropy(x).dtype))
        results.append(x.grad)
    assert torch.equal(*results)


def test_gradcheck():
    logits = logits_like_text(2, 3, 7, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: segment_logits(x, 1.0)[0], logits)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_opcheck(dtype):
    logits = logits_like_text(2, 9, 7, dtype)
    opcheck("segment_logits", (logits, 1.0, "threshold", None, None, None, None, True, None))
    seq_lens = torch.tensor([9, 4])
    args = (logits.clone().requires_grad_(), 1.0, "combined", 0.1, 3, seq_lens, None, False, 5)
    opcheck("segment_logits", args)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    opcheck("segment_logits", (logits[:1], 1.0, "monotonic", None, None, None, cu_seqlens, True, 6))


def test_compile():
    def step(logits, seq_lens):
        entropies, layout = segment_logits(logits, 2.5, seq_lens=seq_lens, capacity=40)
        return entropies, layout.patch_ids, layout.visible_ids, layout.num_patches

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    with assert_no_recompile():
        for n in (50, 40, 64, 33):
            logits = logits_like_text(3, n, seed=n).requires_grad_()
            seq_lens = torch.tensor([n, n // 2, n - 1])
            got, want = compiled(logits, seq_lens), step(logits, seq_lens)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            (a,) = torch.autograd.grad(got[0].sum(), logits)
            (b,) = torch.autograd.grad(want[0].sum(), logits)
            assert torch.equal(a, b)


def test_autocast_changes_nothing():
    logits = logits_like_text(2, 30)
    want = flat(segment_logits(logits, 2.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(flat(segment_logits(logits, 2.5)), want, strict=True))


def test_inference_mode_and_meta():
    with torch.inference_mode():
        entropies, _ = segment_logits(logits_like_text(2, 30), 2.5)
        assert entropies.is_inference()
    entropies, layout = torch.ops.blt_kernels.segment_logits(
        torch.empty(2, 30, 260, device="meta", dtype=torch.bfloat16), 2.5, "threshold", None, None, None, None, True, 8
    )[:2]
    assert entropies.shape == (2, 30) and entropies.dtype == torch.float32 and layout.shape == (2, 9)


@pytest.mark.parametrize(
    "logits, options, error, message",
    [
        ([1.0], {}, TypeError, "segment_logits: logits: expected a torch.Tensor, got list"),
        (torch.zeros(2, 3, 4).int(), {}, TypeError, "segment_logits: logits: expected dtype"),
        (torch.zeros(2, 3), {}, ValueError, "segment_logits: logits: expected 3 dimensions"),
        (torch.zeros(2, 3, 0), {}, ValueError, r"segment_logits: logits: expected shape \[B, N, V\] with V >= 1"),
        (torch.zeros(2, 3, 4), {"rule": "spaces"}, ValueError, "segment_logits: rule: expected one of 'threshold'"),
        (torch.zeros(2, 3, 4), {"threshold": "1"}, TypeError, "segment_logits: threshold: expected a float"),
        (torch.zeros(2, 3, 4), {"delta": 1.0}, ValueError, "segment_logits: delta: expected None"),
        (torch.zeros(2, 3, 4), {"max_patch_length": 0}, ValueError, "segment_logits: max_patch_length"),
        (torch.zeros(2, 3, 4), {"bos_patch": 1}, TypeError, "segment_logits: bos_patch: expected a bool"),
        (torch.zeros(2, 3, 4), {"capacity": 0}, ValueError, "segment_logits: capacity: expected at least 1"),
        (torch.zeros(2, 3, 4), {"seq_lens": torch.zeros(3).int()}, ValueError, "segment_logits: seq_lens"),
        (torch.zeros(2, 3, 4), {"cu_seqlens": torch.zeros(3).int()}, ValueError, r"segment_logits: logits: .*B = 1"),
    ],
)
def test_errors(logits, options, error, message):
    with pytest.raises(error, match=message):
        segment_logits(logits, **{"threshold": 1.0, **options})
    if isinstance(logits, torch.Tensor):
        with use_backend("reference"), pytest.raises(error, match=message):
            segment_logits(logits, **{"threshold": 1.0, **options})


def test_values_out_of_range_name_this_op():
    with pytest.raises(RuntimeError, match="segment_logits: seq_lens"):
        segment_logits(torch.zeros(2, 3, 4), 1.0, seq_lens=torch.tensor([3, 4]))


def test_reference_has_the_same_signature():
    assert inspect.signature(segment_logits) == inspect.signature(reference.segment_logits)


@pytest.mark.parametrize("capability", CPU_CAPABILITIES)
def test_capabilities(capability):
    run_with_capability(
        """
        import test_segment_logits as t
        for dtype in t.FLOAT_DTYPES:
            t.assert_entropy_then_segment(t.logits_like_text(3, 70, dtype=dtype), 2.5, rule="combined", delta=0.1)
        t.test_matches_the_reference()
        t.test_threads()
        """,
        capability,
    )
