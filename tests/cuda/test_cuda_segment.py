"""segment, segment_spaces, segment_fixed, segment_logits: every field equal to that of the CPU ops."""

import math

import pytest
import torch
from helpers import FLOAT_DTYPES, awkward_view
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_layout import TILE, assert_equal, cpu, sequences

RULES = [("threshold", None), ("monotonic", None), ("combined", 0.2)]


def entropies_like_text(batch, num_bytes, seed=0):
    e = torch.rand(batch, num_bytes, generator=torch.Generator().manual_seed(seed)) * 4
    if num_bytes > 9:  # no comparison with NaN is true
        e[:, 4], e[:, 6], e[:, 7], e[:, 8] = math.nan, math.inf, math.inf, -math.inf
    return e


def text(batch, num_bytes, seed=0):
    """Tokens of spaces, UTF-8 and special tokens, and numbers that are no tokens."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor([36, 36, 101, 101, 102, 52, 70, 0, 3, 4, 132, 195, 196, 255, -(2**63), 2**63 - 1])
    return pool[torch.randint(len(pool), (batch, num_bytes), generator=generator)]


@st.composite
def options(draw, batch):
    """max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity."""
    _, num_bytes, seq_lens, cu_seqlens, count = batch
    in_row = 1 if cu_seqlens is None else count
    capacity = draw(st.one_of(st.none(), st.integers(in_row, in_row + 6), st.just(max(num_bytes, in_row))))
    longest = draw(st.sampled_from([None, 1, 2, 3, 5, 100, 2**40]))
    return longest, seq_lens, cu_seqlens, draw(st.booleans()), capacity


@pytest.mark.usefixtures("poisoned_memory")
@given(
    data=st.data(), batch=sequences(), threshold=st.sampled_from([-math.inf, 0.5, 2.5, 4.0]), seed=st.integers(0, 99)
)
@pytest.mark.parametrize("rule, delta", RULES)
def test_entropies(cuda_ops, rule, delta, data, batch, threshold, seed):
    e = entropies_like_text(*batch[:2], seed)
    args = (e, threshold, rule, delta, *data.draw(options(batch)))
    assert_equal(cuda_ops.segment(*args), cpu.segment(*args))


@pytest.mark.usefixtures("poisoned_memory")
@given(data=st.data(), batch=sequences(), byte_offset=st.sampled_from([0, 4]), seed=st.integers(0, 99))
def test_spaces(cuda_ops, data, batch, byte_offset, seed):
    args = (text(*batch[:2], seed), byte_offset, *data.draw(options(batch)))
    assert_equal(cuda_ops.segment_spaces(*args), cpu.segment_spaces(*args))


@pytest.mark.usefixtures("poisoned_memory")
@given(data=st.data(), batch=sequences(), patch_size=st.sampled_from([1, 2, 3, 7, 16, 17, 2**31, 2**62]))
def test_fixed(cuda_ops, data, batch, patch_size):
    args = (text(*batch[:2]), patch_size, *data.draw(options(batch)))
    assert_equal(cuda_ops.segment_fixed(*args), cpu.segment_fixed(*args))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("longest", [None, 3, 1500])
@pytest.mark.parametrize("num_bytes, packed", [(3 * TILE + 8, True), (2 * TILE + 1, False)])
def test_rows_of_several_blocks(cuda_ops, num_bytes, packed, longest):
    e = entropies_like_text(1 if packed else 2, num_bytes)
    e[0, 100 : 2 * TILE] = 0  # here only max_patch_length makes starts, over more than a block
    seq_lens, cu_seqlens = torch.tensor([num_bytes, TILE + 1]), None
    if packed:
        seq_lens, cu_seqlens = (
            None,
            torch.tensor([0, 1, 3, 5, 5, 50, TILE - 1, TILE - 1, TILE, 2 * TILE + 9, num_bytes - 5]),
        )
    for (rule, delta), bos_patch, capacity in zip(RULES, (True, False, True), (None, 60, 60), strict=True):
        args = (e, 2.5, rule, delta, longest, seq_lens, cu_seqlens, bos_patch, capacity)
        assert_equal(cuda_ops.segment(*args), cpu.segment(*args))
    tokens = text(len(e), num_bytes)
    args = (longest, seq_lens, cu_seqlens, True, 800)
    assert_equal(cuda_ops.segment_spaces(tokens, 4, *args), cpu.segment_spaces(tokens, 4, *args))
    assert_equal(cuda_ops.segment_fixed(tokens, 6, *args), cpu.segment_fixed(tokens, 6, *args))


def test_views(cuda_ops):
    e, tokens = entropies_like_text(2, 40), text(2, 40)
    for view in (awkward_view(e), e[:, 1:], e[:, ::2], e.t().contiguous().t()):
        dense = view.contiguous()
        args = (2.5, "combined", 0.1, None, None, None, True, None)
        assert_equal(cuda_ops.segment(view, *args), cpu.segment(dense, *args))
    for view in (awkward_view(tokens), tokens[:, 1:]):
        args = (4, None, None, None, True, None)
        assert_equal(cuda_ops.segment_spaces(view, *args), cpu.segment_spaces(view.contiguous(), *args))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rule, delta", RULES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_logits(cuda_ops, dtype, rule, delta):
    logits = (torch.randn(2, 70, 17) * 4 * torch.rand(2, 70, 1)).to(dtype)
    for x in (logits, awkward_view(logits), logits[:, :0], logits[:0]):
        seq_lens = torch.tensor([70, 33])[: len(x)].clamp(max=x.shape[1])
        args = (1.5, rule, delta, 9, seq_lens, None, True, 50)
        entropies, *fields = cuda_ops.segment_logits(x, *args)
        assert torch.equal(entropies, cuda_ops.entropy(x))
        assert_equal(fields, cpu.segment(entropies.float(), *args))


@pytest.mark.parametrize(
    "options, message",
    [
        (("spaces", None, None, None, None, True, None), "segment: rule: expected threshold"),
        (("combined", None, None, None, None, True, None), "segment: delta: expected one"),
        (("threshold", None, 0, None, None, True, None), "segment: max_patch_length: expected at least 1, got 0"),
        (("threshold", None, None, None, None, True, 0), "segment: capacity: expected at least 1"),
    ],
)
def test_errors_are_those_of_the_cpu(cuda_ops, options, message):
    for ops in (cuda_ops, cpu):
        with pytest.raises(RuntimeError, match=message):
            ops.segment(torch.zeros(2, 3), 1.0, *options)
