"""Layouts from lengths and from starts: every field equals that of the CPU ops, which have an oracle of their own."""

import pytest
import torch
from helpers import awkward_view, random_lengths
from hypothesis import given
from hypothesis import strategies as st

cpu = torch.ops.blt_kernels
TILE = 1024  # bytes of a block


def assert_equal(got, expected):
    for name, a, b in zip(
        ("offsets", "patch_ids", "visible_ids", "num_patches", "cu_patches", "overflow"), got, expected, strict=True
    ):
        assert a.dtype == b.dtype == torch.int32 and a.is_contiguous() and torch.equal(a, b), f"{name}:\n{a}\n{b}"


@st.composite
def sequences(draw, sizes=(0, 1, 2, 5, 17, 40), batches=(0, 1, 2, 3)):
    """B, N, seq_lens, cu_seqlens, S, a dtype of the latter two."""
    num_bytes = draw(st.sampled_from(sizes))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    kind = draw(st.sampled_from(["whole", "padded", "packed"]))
    if kind == "packed":
        ends = sorted(draw(st.lists(st.integers(0, num_bytes), max_size=6)))
        ends += ends[-1:] * draw(st.integers(0, 2))  # repeats: empty sequences
        return 1, num_bytes, None, torch.tensor([0, *ends], dtype=dtype), len(ends)
    batch = draw(st.sampled_from(batches))
    lens = [draw(st.integers(0, num_bytes)) for _ in range(batch)]
    return batch, num_bytes, torch.tensor(lens, dtype=dtype) if kind == "padded" else None, None, batch


@st.composite
def maybe_next(draw, count):
    return torch.tensor([draw(st.booleans()) for _ in range(count)], dtype=torch.bool) if draw(st.booleans()) else None


@pytest.mark.usefixtures("poisoned_memory")
@given(data=st.data(), batch=sequences(), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 99))
def test_starts(cuda_ops, data, batch, density, seed):
    rows, num_bytes, seq_lens, cu_seqlens, count = batch
    mask = torch.rand(rows, num_bytes, generator=torch.Generator().manual_seed(seed)) < density
    in_row = 1 if cu_seqlens is None else count
    capacity = data.draw(st.one_of(st.none(), st.integers(in_row, in_row + 6), st.just(max(num_bytes, in_row))))
    args = (mask, seq_lens, cu_seqlens, data.draw(maybe_next(count)), capacity)
    assert_equal(cuda_ops.layout_from_starts(*args), cpu.layout_from_starts(*args))


@pytest.mark.usefixtures("poisoned_memory")
@given(data=st.data(), batch=sequences(), seed=st.integers(0, 99))
def test_lengths(cuda_ops, data, batch, seed):
    rows, num_bytes, seq_lens, cu_seqlens, count = batch
    generator = torch.Generator().manual_seed(seed)
    slots = data.draw(st.integers(0, 9))
    if cu_seqlens is None:
        lengths = torch.randint(-1, 6, (rows, slots), generator=generator)
        lengths[lengths.clamp(min=0).cumsum(1) > num_bytes + 1] = 0
    else:  # each sequence is two patches, with an empty slot between; then perhaps the unseen byte
        whole = cu_seqlens.diff().long()
        lengths = torch.stack([whole // 3, torch.zeros_like(whole), whole - whole // 3], 1).flatten()
        extra = torch.ones(data.draw(st.integers(0, 1)), dtype=torch.int64)
        lengths = torch.cat([lengths, extra, torch.zeros(slots, dtype=torch.int64)])[None]
    if data.draw(st.booleans()):
        lengths = lengths.int()
    args = (lengths, num_bytes, seq_lens, cu_seqlens, data.draw(maybe_next(count)))
    assert_equal(cuda_ops.layout_from_lengths(*args), cpu.layout_from_lengths(*args))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("num_bytes", [TILE - 1, TILE, TILE + 1, 3 * TILE + 5, 3 * TILE + 8])
def test_rows_of_several_blocks(cuda_ops, num_bytes):
    mask = torch.rand(2, num_bytes) < 0.2
    mask[1, : TILE + 3] = False  # bytes before the first start
    seq_lens = torch.tensor([num_bytes, num_bytes - 3])
    for capacity in (None, 100, num_bytes + 7):
        args = (mask, seq_lens, None, torch.tensor([True, False]), capacity)
        assert_equal(cuda_ops.layout_from_starts(*args), cpu.layout_from_starts(*args))
    for lengths in (random_lengths(num_bytes, 4.5, batch=2), random_lengths(num_bytes, 1.1, batch=2).int()):
        args = (lengths, num_bytes, None, None, None)
        assert_equal(cuda_ops.layout_from_lengths(*args), cpu.layout_from_lengths(*args))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("capacity", [None, 40, 300])
def test_packed_sequences_of_several_blocks(cuda_ops, capacity):
    num_bytes = 3 * TILE
    mask = torch.rand(1, num_bytes) < 0.1
    ends = torch.randint(0, num_bytes - 9, (30,)).sort().values
    ends[5:9], ends[11], ends[12], ends[-3:] = ends[5], TILE, TILE, ends[-1]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends.sort().values]).int()
    args = (mask, None, cu_seqlens, torch.rand(30) < 0.5, capacity)
    assert_equal(cuda_ops.layout_from_starts(*args), cpu.layout_from_starts(*args))
    patches = torch.cat([cu_seqlens, mask[0, : cu_seqlens[-1]].nonzero().flatten().int()]).sort().values
    args = (patches.diff()[None], num_bytes, None, cu_seqlens, None)
    assert_equal(cuda_ops.layout_from_lengths(*args), cpu.layout_from_lengths(*args))


def test_more_rows_than_warps(cuda_ops):
    mask = torch.rand(35, 3) < 0.4
    args = (mask, None, None, None, 2)
    assert_equal(cuda_ops.layout_from_starts(*args), cpu.layout_from_starts(*args))


def test_rows_of_more_tiles_than_threads(cuda_ops):
    """A thread adds up the counts of more than one tile, and the end of a row lies many tiles before that of N."""
    mask = torch.rand(2, 130 * TILE + 9) < 0.01
    args = (mask, torch.tensor([mask.size(1), 70 * TILE]), None, None, None)
    assert_equal(cuda_ops.layout_from_starts(*args), cpu.layout_from_starts(*args))


def test_views(cuda_ops):
    mask, seq_lens = torch.rand(2, 40) < 0.4, torch.tensor([40, 31])
    expected = cpu.layout_from_starts(mask, seq_lens, None, None, None)
    assert_equal(cuda_ops.layout_from_starts(awkward_view(mask), awkward_view(seq_lens), None, None, None), expected)
    assert_equal(
        cuda_ops.layout_from_starts(mask[:, 1:], None, None, None, None),
        cpu.layout_from_starts(mask[:, 1:], None, None, None, None),
    )


@pytest.mark.usefixtures("poisoned_memory")
def test_bad_values_are_clamped(cuda_ops):
    mask = torch.rand(2, 20) < 0.4
    got = cuda_ops.layout_from_starts(mask, torch.tensor([2**40, -(2**40)]), None, None, 5)
    assert_equal(got, cpu.layout_from_starts(mask, torch.tensor([20, 0]), None, None, 5))
    got = cuda_ops.layout_from_starts(mask[:1], None, torch.tensor([7, -3, 9, 2**40]), None, 5)
    assert_equal(got, cpu.layout_from_starts(mask[:1], None, torch.tensor([0, 0, 9, 20]), None, 5))
    # Values that decrease cut the row into sequences somehow, and the layout must be sound.
    for values in ([0, 15, 3, 9, 2, 12], [5, 1, 0, 30, -2, 7], [0, 20, 0, 20, 0, 20]):
        for capacity in (None, 5, 8):
            args = (mask[:1], None, torch.tensor(values), None, capacity)
            offsets, ids, visible, num_patches, cu_patches, overflow = cuda_ops.layout_from_starts(*args)
            assert offsets[0, 0] == 0 and (offsets.diff() >= 0).all() and offsets.max() <= 20
            inside = ids[ids >= 0]
            assert (inside.diff() >= 0).all() and (visible <= ids).all() and (visible >= -1).all()
            assert num_patches == (int(inside.max()) + 1 if len(inside) else 0) and overflow >= 0
            assert (cu_patches.diff() >= 0).all() and cu_patches[0] == 0 and cu_patches[-1] == num_patches
    lengths = torch.tensor([[3, 2**62, 2**62, 2**62, 4]])  # sums beyond N + 1, and beyond int64
    got = cuda_ops.layout_from_lengths(lengths, 9, None, None, None)
    assert_equal(got, cpu.layout_from_lengths(torch.tensor([[3, 6, 0, 0, 0]]), 9, None, None, None))


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.zeros(2, 3), None, None, None, None), "mask: expected dtype bool"),
        ((torch.zeros(2, 3).bool(), None, torch.tensor([0, 3]), None, None), r"one row \(B = 1\)"),
        ((torch.zeros(1, 3).bool(), None, torch.tensor([0, 1, 3]), None, 1), "capacity: expected at least 2"),
        ((torch.zeros(1, 3).bool(), torch.tensor([1.0]), None, None, None), "seq_lens: expected dtype int32 or int64"),
        ((torch.zeros(2, 3).bool(), None, None, torch.tensor([True]), None), "next_is_start: expected size 2"),
    ],
)
def test_errors_are_those_of_the_cpu(cuda_ops, args, message):
    for ops in (cuda_ops, cpu):
        with pytest.raises(RuntimeError, match=message):
            ops.layout_from_starts(*args)
