"""PatchLayout: its fields against an independent oracle, and everything that a layout can do."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import layout_oracle as oracle
import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as pytree
from helpers import (
    HUGE_PATCH,
    RAGGED,
    assert_no_recompile,
    assert_same_for_any_threads,
    awkward_view,
    lengths_of,
    make_layout,
    opcheck,
    random_lengths,
)
from hypothesis import given
from hypothesis import strategies as st
from layout_oracle import FIELDS, assert_fields, assert_same

from blt_kernels import (
    PatchLayout,
    decoder_cross_attention,
    encoder_cross_attention,
    patch_gather,
    patch_pool,
    use_backend,
)

BACKENDS = ("cpu", "reference")
FEW_SLOTS = st.one_of(st.none(), st.integers(0, 3))
from_lengths, from_starts = PatchLayout.from_lengths, PatchLayout.from_starts


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def own(layout: PatchLayout) -> list:
    return layout.patch_ids.tolist()


def seen(layout: PatchLayout) -> list:
    return layout.visible_ids.tolist()


def tensor(values: list | None, dtype: torch.dtype = torch.int64) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=dtype)


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, int, list[int] | None, list[int] | None, list[bool] | None]:
    """B, N, seq_lens, cu_seqlens, next_is_start."""
    num_bytes = draw(st.integers(0, 20))
    unknown = draw(st.booleans())
    if draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, num_bytes), min_size=1, max_size=6))
        cu = [0, *sorted(cuts)]
        next_is_start = [draw(st.booleans()) for _ in cuts]
        return 1, num_bytes, None, cu, None if unknown else next_is_start
    batch = draw(st.integers(1, 3))
    seq_lens = [draw(st.integers(0, num_bytes)) for _ in range(batch)] if draw(st.booleans()) else None
    return batch, num_bytes, seq_lens, None, None if unknown else [draw(st.booleans()) for _ in range(batch)]


# ---- from_lengths ----------------------------------------------------------------------------------------------------


@given(batches(), st.data())
def test_from_lengths_matches_oracle(batch_of, data):
    batch, num_bytes, seq_lens, cu, next_is_start = batch_of
    if cu is None:
        length = st.one_of(st.integers(-1, 2), st.integers(1, 9))
        slots = data.draw(st.integers(0, 6))
        rows = [data.draw(st.lists(length, min_size=slots, max_size=slots)) for _ in range(batch)]
        for row in rows:
            while sum(max(0, n) for n in row) > num_bytes + 1:
                row[row.index(max(row))] -= 1
    else:  # every sequence begins at a patch; perhaps with the unseen byte, perhaps without the last patches
        row = []
        for begin, end in itertools.pairwise(cu):
            while begin < end:
                row += [0] * data.draw(st.integers(0, 1))
                row.append(data.draw(st.integers(1, end - begin)))
                begin += row[-1]
        row += [0] * data.draw(st.integers(0, 2)) + data.draw(st.sampled_from([[], [1], [-1]]))
        rows = [row[: data.draw(st.integers(0, len(row)))]]
    expected = oracle.from_lengths(rows, num_bytes, seq_lens, cu, next_is_start)
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    lengths = torch.tensor(rows, dtype=dtype).reshape(batch, len(rows[0]))
    keywords = {
        "seq_lens": tensor(seq_lens, dtype),
        "cu_seqlens": tensor(cu, dtype),
        "next_is_start": tensor(next_is_start, torch.bool),
    }
    for name in BACKENDS:
        with use_backend(name):
            layout = from_lengths(lengths, num_bytes, **keywords)
            assert_fields(layout, expected)
            assert_fields(from_lengths(awkward_view(lengths), num_bytes, **keywords), expected)
            layout.validate()


def test_published_decoder_ids(backend):
    layout = from_lengths(torch.tensor([[1, 1, 3, 2, 1]]), 7)
    assert own(layout) == [[0, 1, 2, 2, 2, 3, 3]]
    assert seen(layout) == [[0, 1, 1, 1, 2, 2, 3]]
    assert layout.num_patches.tolist() == [4]


@pytest.mark.parametrize(
    ("lengths", "last_seen"),
    [
        ([2, 3], 0),  # n: the last patch is open
        ([2, 3, 1], 1),  # n + 1, the unseen byte alone: closed
        ([2, 4], 0),  # n + 1, the unseen byte in the last patch: open
        ([2, 3, 0, 1], 1),  # closed is closed, whatever lies between
        ([2, 3, 0], 0),  # transformers, a start at S: no more than a sum of n
        ([2, 4, -1], 0),  # transformers, a shorter row of a batch
        ([2, 3, 1, -1], 1),
    ],
)
def test_lengths_say_what_comes_next(backend, lengths, last_seen):
    layout = from_lengths(torch.tensor([lengths]), 5)
    assert own(layout) == [[0, 0, 1, 1, 1]]
    assert seen(layout)[0] == [-1, 0, 0, 0, last_seen]
    assert layout.num_patches.tolist() == [2]
    for known in (False, True):  # overrides the lengths
        layout = from_lengths(torch.tensor([lengths]), 5, next_is_start=torch.tensor([known]))
        assert seen(layout)[0][-1] == int(known)


def test_bytes_after_the_lengths_belong_to_no_patch(backend):
    layout = from_lengths(torch.tensor([[2, 1]]), 5)
    assert own(layout) == [[0, 0, 1, -1, -1]]
    assert seen(layout) == [[-1, 0, 0, -1, -1]]
    assert layout.offsets.tolist() == [[0, 2, 3]]


def test_lengths_beyond_the_real_bytes_are_cut(backend):
    layout = from_lengths(torch.tensor([[2, 1, 3], [2, 3, 1]]), 6, seq_lens=torch.tensor([3, 4]))
    assert own(layout) == [[0, 0, 1, -1, -1, -1], [0, 0, 1, 1, -1, -1]]
    assert seen(layout) == [[-1, 0, 1, -1, -1, -1], [-1, 0, 0, 0, -1, -1]]


def test_num_bytes_defaults_to_the_longest_row(backend):
    layout = from_lengths(torch.tensor([[2, 1, -1], [2, 3, 1]]), seq_lens=torch.tensor([3, 6]))
    assert layout.num_bytes == 6
    assert from_lengths(torch.empty(0, 4, dtype=torch.int64)).num_bytes == 0
    assert from_lengths(torch.empty(2, 0, dtype=torch.int64)).num_bytes == 0


def test_empty_slots_between_packed_sequences_belong_to_the_earlier_one(backend):
    lengths = torch.tensor([[0, 2, 0, 0, 1, 2, 0]])
    layout = from_lengths(lengths, 6, cu_seqlens=torch.tensor([0, 0, 2, 2, 5, 5]))
    assert own(layout) == [[1, 1, 4, 5, 5, -1]]
    assert seen(layout) == [[0, 0, 4, 4, 4, -1]]  # slot 0 is inside the first sequence, 1 .. 3 outside the second
    assert layout.cu_patches.tolist() == [0, 0, 4, 4, 6, 6]


def test_leading_empty_slots_of_a_row_count_literally(backend):
    layout = from_lengths(torch.tensor([[0, 0, 3, 2]]), 5)
    assert seen(layout) == [[1, 1, 2, 2, 2]]


def test_random_long_rows_are_the_same_on_every_backend():
    lengths = random_lengths(3000, 4.5, batch=3, seed=1)
    layout = make_layout(lengths)
    with use_backend("reference"):
        assert_same(layout, make_layout(lengths))
    starts = layout.patch_ids.diff(dim=1, prepend=torch.full((3, 1), -1)) > 0
    assert_same(layout.validate(), from_starts(starts, capacity=layout.capacity))


@pytest.mark.parametrize("name", RAGGED)
def test_unwritten_fields_would_show(name, poisoned_memory):
    layout = make_layout(lengths_of(name), int(lengths_of(name).sum(1).max()) + 2)
    with use_backend("reference"):
        assert_same(layout, make_layout(lengths_of(name), int(lengths_of(name).sum(1).max()) + 2))


def test_huge_patch():
    layout = make_layout(torch.tensor(HUGE_PATCH)).validate()
    assert layout.lengths().tolist() == HUGE_PATCH
    assert (layout.visible_ids[0, 2:-3] == 0).all()


# ---- from_starts -----------------------------------------------------------------------------------------------------


@given(batches(), FEW_SLOTS, st.data())
def test_from_starts_matches_oracle(batch_of, few, data):
    batch, num_bytes, seq_lens, cu, next_is_start = batch_of
    row = st.one_of(
        st.lists(st.booleans(), min_size=num_bytes, max_size=num_bytes),
        st.just([True] * num_bytes),
        st.just([False] * num_bytes),
    )
    mask = [data.draw(row) for _ in range(batch)]
    capacity = None if few is None else few + (1 if cu is None else len(cu) - 1)
    expected = oracle.from_starts(mask, num_bytes, seq_lens, cu, next_is_start, capacity)
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    keywords = {
        "seq_lens": tensor(seq_lens, dtype),
        "cu_seqlens": tensor(cu, dtype),
        "next_is_start": tensor(next_is_start, torch.bool),
        "capacity": capacity,
    }
    starts = torch.tensor(mask, dtype=torch.bool).reshape(batch, num_bytes)
    for name in BACKENDS:
        with use_backend(name):
            layout = from_starts(starts, **keywords)
            assert_fields(layout, expected)
            assert_fields(from_starts(awkward_view(starts), **keywords), expected)
            layout.validate()
            assert bool((layout.overflow == 0).all()) or capacity is not None
            # No byte is lost and no patch spans two sequences, whatever the capacity.
            if capacity is not None:
                exact = from_starts(starts, **{**keywords, "capacity": None})
                assert torch.equal(layout.patch_ids >= 0, exact.patch_ids >= 0)


def test_left_padding(backend):
    layout = from_starts(torch.tensor([[False, False, True, False, True]]))
    assert layout.offsets.tolist() == [[2, 4, 5, 5, 5, 5]]
    assert own(layout) == [[-1, -1, 0, 0, 1]]
    assert seen(layout) == [[-1, -1, -1, 0, 0]]


def test_overflow_merges_the_later_patches(backend):
    layout = from_starts(torch.ones(1, 5, dtype=torch.bool), capacity=3)
    assert own(layout) == [[0, 1, 2, 2, 2]]
    assert layout.overflow.tolist() == [2]
    # Every packed sequence keeps a slot: min(j, C - S + s).
    layout = from_starts(torch.ones(1, 6, dtype=torch.bool), cu_seqlens=torch.tensor([0, 3, 4, 6]), capacity=4)
    assert own(layout) == [[0, 1, 1, 2, 3, 3]]
    assert layout.cu_patches.tolist() == [0, 2, 3, 4]
    assert layout.overflow.tolist() == [2]
    assert seen(layout) == [[0, 0, 0, -1, -1, -1]]
    # The decision about the unseen byte closes the last patch, merged or not.
    layout = from_starts(torch.ones(1, 5, dtype=torch.bool), capacity=3, next_is_start=torch.tensor([True]))
    assert seen(layout) == [[0, 1, 1, 1, 2]]


def test_without_a_capacity_nothing_merges(backend):
    cu = torch.tensor([0, 4, 4, 4, 5, 5, 5, 5])  # more sequences than bytes
    layout = from_starts(torch.ones(1, 5, dtype=torch.bool), cu_seqlens=cu)
    assert layout.capacity == 5
    assert own(layout) == [[0, 1, 2, 3, 4]]
    assert layout.overflow.tolist() == [0]


def test_sequences_start_patches_whatever_the_mask_says(backend):
    layout = from_starts(torch.zeros(1, 6, dtype=torch.bool), cu_seqlens=torch.tensor([0, 2, 2, 5]))
    assert own(layout) == [[0, 0, 1, 1, 1, -1]]
    assert layout.cu_patches.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (2, 0), (1, 0)])
def test_empty_batches(backend, shape):
    layout = from_starts(torch.zeros(shape, dtype=torch.bool)).validate()
    assert layout.offsets.shape == (shape[0], shape[1] + 1)
    assert layout.cu_patches.tolist() == [0] * (shape[0] + 1)
    packed = from_starts(torch.zeros(1, shape[1], dtype=torch.bool), cu_seqlens=torch.tensor([0])).validate()
    assert packed.cu_patches.tolist() == [0]


def test_any_true_byte_is_a_start():
    mask = torch.tensor([[1, 0, 255, 2]], dtype=torch.uint8).view(torch.bool)
    assert own(from_starts(mask)) == [[0, 0, 1, 2]]


# ---- the ops under torch's eyes --------------------------------------------------------------------------------------


def test_opcheck():
    mask, cu = torch.rand(1, 9) < 0.4, torch.tensor([0, 4, 4, 7])
    opcheck("layout_from_starts", (mask, None, cu, torch.tensor([True, False, True]), 5))
    opcheck("layout_from_starts", (torch.rand(3, 9) < 0.4, torch.tensor([9, 0, 4]), None, None, None))
    lengths = torch.tensor([[1, 0, 3], [2, 2, 1]])
    opcheck("layout_from_lengths", (lengths, 6, torch.tensor([4, 4], dtype=torch.int32), None, None))
    opcheck("layout_from_lengths", (lengths[:1], 6, None, torch.tensor([0, 1, 4]), torch.tensor([True, True])))


def test_compiles_once_over_raggedness():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(lengths, mask, seq_lens, x):
        a = from_lengths(lengths, mask.shape[1], seq_lens=seq_lens)
        b = from_starts(mask, seq_lens=seq_lens, capacity=8)
        return a, b, patch_pool(x, b), a.lengths(), b.unpack(b.pack(patch_pool(x, b), 16))

    with assert_no_recompile():
        for seed in range(4):
            lengths = random_lengths(24, 3 + seed, batch=2, seed=seed)
            lengths = torch.nn.functional.pad(lengths, (0, 20))[:, :20].contiguous()
            mask, seq_lens = torch.rand(2, 24) < 0.1 + 0.2 * seed, torch.tensor([24, 4 * seed])
            x = torch.randn(2, 24, 3)
            a, b, pooled, a_lengths, again = both(lengths, mask, seq_lens, x)
            assert_same(a, from_lengths(lengths, 24, seq_lens=seq_lens))
            assert_same(b, from_starts(mask, seq_lens=seq_lens, capacity=8))
            assert torch.equal(pooled, patch_pool(x, b))
            assert torch.equal(a_lengths, a.lengths())
            assert torch.equal(again, pooled)


def test_compiled_functions_take_layouts():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def gather(y, layout):
        return patch_gather(y, layout), dataclasses.replace(layout, overflow=layout.overflow + 1)

    with assert_no_recompile():
        for mean in (2, 4, 6):
            layout = from_starts(torch.rand(2, 24) < 1 / mean, capacity=8)
            y = torch.randn(2, 8, 3)
            out, changed = gather(y, layout)
            assert torch.equal(out, patch_gather(y, layout))
            assert torch.equal(changed.overflow, layout.overflow + 1)


def test_number_of_bytes_does_not_recompile_either():
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda lengths, n: from_lengths(lengths, n), fullgraph=True, backend=counter, dynamic=True)
    torch._dynamo.reset()
    for n in (24, 25, 31, 47):
        assert_same(compiled(torch.full((2, 6), 4), n), from_lengths(torch.full((2, 6), 4), n))
    assert counter.frame_count == 1


def test_threads_do_not_change_it():
    mask = torch.rand(8, 9000) < 0.2
    assert_same_for_any_threads(lambda: pytree.tree_leaves(from_starts(mask, capacity=1700)))
    lengths = random_lengths(9000, 4.5, batch=8)
    assert_same_for_any_threads(lambda: pytree.tree_leaves(from_lengths(lengths, 9000)))


def test_inference_mode_and_meta():
    with torch.inference_mode():
        assert own(from_lengths(torch.tensor([[2, 1]]), 3)) == [[0, 0, 1]]
    meta = from_starts(torch.zeros(2, 7, dtype=torch.bool, device="meta"), capacity=3)
    assert meta.offsets.shape == (2, 4)
    assert meta.patch_ids.shape == (2, 7)
    assert meta.cu_patches.shape == (3,)


# ---- errors ----------------------------------------------------------------------------------------------------------

LENGTHS, MASK = torch.tensor([[1, 2], [3, 0]]), torch.zeros(2, 3, dtype=torch.bool)
ONE = MASK[:1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: from_lengths([[1]], 1), TypeError, "lengths: expected a torch.Tensor, got list"),
        (lambda: from_lengths(LENGTHS.float(), 3), TypeError, "lengths: expected dtype int32 or int64, got float32"),
        (lambda: from_lengths(LENGTHS[0], 3), ValueError, r"lengths: expected 2 dimensions, got shape \(2,\)"),
        (lambda: from_lengths(LENGTHS, 3.0), TypeError, "num_bytes: expected an int, got float"),
        (lambda: from_lengths(LENGTHS, -1), ValueError, "num_bytes: expected 0 .. 2147483647, got -1"),
        (lambda: from_lengths(LENGTHS, 2**31), ValueError, "num_bytes: expected 0 .. 2147483647, got 2147483648"),
        (lambda: from_lengths(LENGTHS.to("meta")), ValueError, "num_bytes: expected an int"),
        (lambda: from_starts(MASK.int()), TypeError, "mask: expected dtype bool, got int32"),
        (lambda: from_starts(MASK, seq_lens=[1, 2]), TypeError, "seq_lens: expected a torch.Tensor, got list"),
        (lambda: from_starts(MASK, seq_lens=torch.ones(2)), TypeError, "seq_lens: expected dtype int32 or int64"),
        (lambda: from_starts(MASK, seq_lens=torch.tensor([1])), ValueError, r"seq_lens: expected shape \(2\)"),
        (
            lambda: from_starts(MASK, seq_lens=torch.ones(2, dtype=int, device="meta")),
            ValueError,
            "seq_lens: .* device",
        ),
        (lambda: from_starts(MASK, cu_seqlens=torch.tensor([0, 3])), ValueError, "expected one row .* got B = 2"),
        (
            lambda: from_starts(ONE, cu_seqlens=torch.empty(0, dtype=int)),
            ValueError,
            r"cu_seqlens: .* shape \(S \+ 1,\)",
        ),
        (
            lambda: from_starts(ONE, cu_seqlens=torch.tensor([0, 3]), seq_lens=torch.tensor([3])),
            ValueError,
            "either seq_lens or cu_seqlens, got both",
        ),
        (lambda: from_starts(MASK, next_is_start=torch.ones(2)), TypeError, "next_is_start: expected dtype bool"),
        (lambda: from_starts(MASK, next_is_start=MASK[0]), ValueError, r"next_is_start: expected shape \(2\)"),
        (lambda: from_starts(MASK, capacity=True), TypeError, "capacity: expected an int, got bool"),
        (lambda: from_starts(MASK, capacity=np.int64(3)), TypeError, "capacity: expected an int, got numpy.int64"),
        (lambda: from_starts(MASK, capacity=0), ValueError, "capacity: expected at least 1, one slot for each"),
        (
            lambda: from_starts(ONE, cu_seqlens=torch.tensor([0, 1, 1, 3]), capacity=2),
            ValueError,
            "capacity: expected at least 3, one slot for each sequence in a row, got 2",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=r"^PatchLayout.from_(lengths|starts): .*" + message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_lengths(LENGTHS, 1), "lengths: expected sums of at most num_bytes \\+ 1 = 2"),
        (lambda: from_lengths(torch.full((1, 3), 2**62), 9), "lengths: expected sums of at most num_bytes \\+ 1 = 10"),
        (
            lambda: from_lengths(torch.tensor([[2, 2]]), 4, cu_seqlens=torch.tensor([0, 3, 4])),
            "lengths: expected a patch that starts at byte 3, where a sequence does",
        ),
        (lambda: from_starts(MASK, seq_lens=torch.tensor([1, 4])), "seq_lens: expected values in 0 .. 3, got 4"),
        (lambda: from_starts(MASK, seq_lens=torch.tensor([1, -1])), "seq_lens: expected values in 0 .. 3, got -1"),
        (lambda: from_starts(ONE, cu_seqlens=torch.tensor([1, 3])), "cu_seqlens: expected"),
        (lambda: from_starts(ONE, cu_seqlens=torch.tensor([0, 2, 1])), "cu_seqlens: expected values that rise from 0"),
        (lambda: from_starts(ONE, cu_seqlens=torch.tensor([0, 4])), "cu_seqlens: expected values that rise from 0"),
    ],
)
def test_value_errors_raise_on_the_cpu(backend, make, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()


def test_registered_ops_check_again():
    ops = torch.ops.blt_kernels
    for call, message in [
        (lambda: ops.layout_from_starts(MASK[0], None, None, None, None), "mask: expected 2 dimensions, got 1"),
        (lambda: ops.layout_from_starts(MASK.int(), None, None, None, None), "mask: expected dtype bool"),
        (lambda: ops.layout_from_starts(MASK, None, None, None, 0), "capacity: expected at least 1"),
        (lambda: ops.layout_from_starts(MASK, None, torch.tensor([0, 3]), None, None), "expected one row"),
        (lambda: ops.layout_from_starts(MASK, torch.ones(2), None, None, None), "seq_lens: expected dtype int32 or"),
        (lambda: ops.layout_from_starts(MASK, torch.tensor([1]), None, None, None), "seq_lens: expected size 2"),
        (lambda: ops.layout_from_starts(MASK, None, None, MASK[0], None), "next_is_start: expected size 2"),
        (lambda: ops.layout_from_lengths(LENGTHS.float(), 3, None, None, None), "lengths: expected dtype int32 or"),
        (lambda: ops.layout_from_lengths(LENGTHS, -1, None, None, None), "num_bytes: expected at least 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


# ---- what a layout can do --------------------------------------------------------------------------------------------


def test_is_a_frozen_pytree():
    layout = make_layout(lengths_of("typical"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.offsets = layout.offsets + 1  # type: ignore[misc]
    leaves, spec = pytree.tree_flatten(layout)
    assert len(leaves) == len(FIELDS)
    assert_same(pytree.tree_unflatten(leaves, spec), layout)
    doubled = pytree.tree_map(lambda t: t * 2, {"layout": layout})["layout"]
    assert torch.equal(doubled.offsets, layout.offsets * 2)
    assert layout == layout
    assert layout != copy.copy(layout)  # no elementwise comparison
    assert len({layout, layout}) == 1
    assert_same(copy.deepcopy(layout), layout)
    assert_same(pickle.loads(pickle.dumps(layout)), layout)


def test_repr_is_short():
    assert repr(make_layout(lengths_of("typical"))) == "PatchLayout(B=2, N=23, C=6, S=2, device='cpu')"


def test_lengths_round_trip():
    for name in RAGGED:
        lengths = lengths_of(name)
        assert torch.equal(make_layout(lengths).lengths(), lengths)
    assert make_layout(lengths).lengths().dtype == torch.int64


def test_to():
    layout = make_layout(lengths_of("typical"))
    assert layout.to("cpu").offsets is layout.offsets
    assert layout.to("meta").visible_ids.device.type == "meta"


def test_copy_():
    layout, other = (from_starts(torch.rand(2, 9) < p, capacity=4) for p in (0.2, 0.6))
    pointers = [t.data_ptr() for t in pytree.tree_leaves(layout)]
    assert layout.copy_(other) is layout
    assert_same(layout, other)
    assert pointers == [t.data_ptr() for t in pytree.tree_leaves(layout)]
    with pytest.raises(ValueError, match=r"copy_: other.offsets: expected shape \(2, 5\), got shape \(2, 6\)"):
        layout.copy_(from_starts(torch.rand(2, 9) < 0.2, capacity=5))
    with pytest.raises(TypeError, match="copy_: other: expected a PatchLayout, got Tensor"):
        layout.copy_(layout.offsets)


@pytest.mark.parametrize(("multiple_of", "capacity"), [(1, 4), (3, 6), (4, 4), (16, 16)])
def test_trim(multiple_of, capacity):
    layout = from_lengths(torch.tensor([[2, 0, 3, 1, 0, 0], [1, 0, 0, 0, 0, 0]]), 6, seq_lens=torch.tensor([6, 1]))
    trimmed = layout.trim(multiple_of).validate()
    assert trimmed.capacity == capacity
    n = min(capacity, 6)
    assert torch.equal(trimmed.lengths()[:, :n], layout.lengths()[:, :n])
    assert int(trimmed.lengths().sum()) == 7
    for name in FIELDS[1:]:
        assert torch.equal(getattr(trimmed, name), getattr(layout, name))


def test_trim_without_patches():
    assert make_layout(lengths_of("all_empty")).trim().validate().capacity == 0
    assert from_starts(torch.zeros(0, 4, dtype=torch.bool)).trim().capacity == 0
    with pytest.raises(ValueError, match="trim: multiple_of: expected at least 1, got 0"):
        make_layout(lengths_of("ones")).trim(0)


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("extra", [None, 0, 3])
def test_pack_and_unpack(name, extra):
    layout = make_layout(lengths_of(name))
    batch, capacity = layout.offsets.shape[0], layout.capacity
    used = layout.num_patches.tolist()
    y = torch.randn(batch, capacity, 2, 3)
    packed = layout.pack(y, None if extra is None else sum(used) + extra)
    expected = torch.cat([y[b, :n] for b, n in enumerate(used)] + [torch.zeros(extra or 0, 2, 3)])
    assert torch.equal(packed, expected[None])
    assert packed.shape[1] == layout.cu_patches[-1] + (extra or 0)
    is_used = torch.arange(capacity) < layout.num_patches[:, None]
    unpacked = layout.unpack(packed)
    assert torch.equal(unpacked, torch.where(is_used[:, :, None, None], y, 0))


def test_pack_and_unpack_do_not_spread_nan():
    layout = make_layout(lengths_of("unequal_rows"))
    y = torch.full((3, 4, 2), torch.nan)
    y[0, :2] = y[1:] = 1
    y.requires_grad_()
    packed = layout.pack(y, 12)
    assert packed.isfinite().all()
    packed.backward(torch.full_like(packed, torch.nan).masked_fill(torch.arange(12)[:, None] < 10, 1))
    assert torch.equal(y.grad, layout.unpack(torch.ones(1, 10, 2)))


@pytest.mark.parametrize("total", [None, 4, 9, 11])
def test_pack_and_unpack_gradients(total):
    layout = from_lengths(torch.tensor([[2, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), 4, seq_lens=torch.tensor([3, 0, 4]))
    y = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    packed = layout.pack(y, total).detach().requires_grad_()
    assert packed.shape[1] == (total or 7)
    assert torch.autograd.gradcheck(lambda y: layout.pack(y, total), y)
    assert torch.autograd.gradcheck(layout.unpack, packed)
    assert torch.autograd.gradgradcheck(lambda y: layout.unpack(layout.pack(y, total)), y)


def test_packed_rows_pack_too():
    layout = from_starts(torch.rand(1, 30) < 0.4, cu_seqlens=torch.tensor([0, 10, 30]), capacity=24)
    y = torch.randn(1, 24, 5)
    used = int(layout.cu_patches[-1])
    assert torch.equal(layout.pack(y), y[:, :used])
    assert torch.equal(layout.unpack(y[:, :used])[:, :used], y[:, :used])


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("PatchLayout.trim: num_patches", lambda layout: layout.trim()),
        ("PatchLayout.validate: offsets", lambda layout: layout.validate()),
        ("PatchLayout.pack: num_patches", lambda layout: layout.pack(torch.zeros(1, 3, 2, device="meta"))),
    ],
)
def test_what_needs_values_says_so(name, use):
    layout = from_lengths(torch.tensor([[2, 1, 1]])).to("meta")
    with pytest.raises(ValueError, match=f"{name}: expected a tensor with values, got a tensor on the meta device"):
        use(layout)


def test_pack_errors():
    layout = make_layout(lengths_of("typical"))
    with pytest.raises(TypeError, match=r"PatchLayout.pack: y: expected a torch.Tensor, got list"):
        layout.pack([1])
    with pytest.raises(ValueError, match=r"PatchLayout.pack: y: expected shape \(2, 6, 3\), got shape \(2, 5, 3\)"):
        layout.pack(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"PatchLayout.pack: y: expected shape \(2, 6\), got shape \(4,\)"):
        layout.pack(torch.zeros(4))
    with pytest.raises(ValueError, match=r"PatchLayout.pack: total: expected at least 0, got -1"):
        layout.pack(torch.zeros(2, 6, 3), -1)
    with pytest.raises(
        ValueError, match=r"PatchLayout.unpack: packed: expected shape \(1, \*, 3\), got shape \(2, 5, 3"
    ):
        layout.unpack(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"PatchLayout.unpack: packed: expected device cpu"):
        layout.unpack(torch.zeros(1, 5, 3, device="meta"))


PADDED = from_lengths(torch.tensor([[2, 0, 3, 0], [1, 2, 1, 1]]), 7, seq_lens=torch.tensor([5, 5]))
PACKED = from_lengths(torch.tensor([[2, 0, 3, 1, 1]]), 7, cu_seqlens=torch.tensor([0, 5, 7]))


@pytest.mark.parametrize(
    ("layout", "field", "at", "value", "message"),
    [
        (PADDED, "offsets", (1, 0), -1, "offsets: expected 0 .. 7 in row 1, slot 0, got -1"),
        (PADDED, "offsets", (1, 4), 8, "offsets: expected 0 .. 7 in row 1, slot 4, got 8"),
        (PADDED, "offsets", (0, 2), 1, "offsets: expected an end no smaller than the start in row 0, slot 1, got 1"),
        (PADDED, "offsets", (1, 2), 2, "patch_ids: expected 2 in row 1, byte 2, got 1"),
        (PADDED, "patch_ids", (0, 6), 3, "patch_ids: expected -1 in row 0, byte 6, got 3"),
        (PADDED, "num_patches", (0,), 4, "num_patches: expected 3 in row 0, got 4"),
        (PADDED, "overflow", (1,), -2, "overflow: expected 0 or more in row 1, got -2"),
        (PADDED, "cu_patches", (1,), 4, "cu_patches: expected 3 in sequence 1, got 4"),
        (PADDED, "visible_ids", (0, 1), 0, "visible_ids: expected 1 in row 0, byte 1, got 0"),
        (
            PADDED,
            "visible_ids",
            (1, 4),
            1,
            "visible_ids: expected the byte's own slot or the one before .* row 1, byte 4",
        ),
        (PADDED, "visible_ids", (1, 6), 0, "visible_ids: expected .* row 1, byte 6, got 0"),
        (
            PACKED,
            "cu_patches",
            (0,),
            1,
            "cu_patches: expected values that rise from 0 to num_patches = 5 in sequence 0",
        ),
        (
            PACKED,
            "cu_patches",
            (1,),
            6,
            "cu_patches: expected values that rise from 0 to num_patches = 5 in sequence 1",
        ),
        (
            PACKED,
            "cu_patches",
            (2,),
            4,
            "cu_patches: expected values that rise from 0 to num_patches = 5 in sequence 2",
        ),
        (PACKED, "cu_patches", (1,), 1, "cu_patches: expected a slot that is not empty in sequence 1, got 1"),
        (PACKED, "visible_ids", (0, 5), 2, "visible_ids: expected 3 in row 0, byte 5, got 2"),
    ],
)
def test_validate_names_the_broken_promise(layout, field, at, value, message):
    layout.validate()
    bad = copy.deepcopy(layout)
    getattr(bad, field)[at] = value
    with pytest.raises(ValueError, match=r"^PatchLayout.validate: " + message):
        bad.validate()


def test_validate_shapes():
    for field, tensor, error, message in [
        ("offsets", PADDED.offsets.long(), TypeError, "offsets: expected dtype int32, got int64"),
        ("offsets", PADDED.offsets[:, :0], ValueError, r"offsets: expected shape \(B, C \+ 1\)"),
        ("patch_ids", PADDED.patch_ids[:1], ValueError, "patch_ids: expected shape"),
        ("visible_ids", PADDED.visible_ids[:, :-1], ValueError, "visible_ids: expected shape"),
        ("num_patches", PADDED.num_patches[:1], ValueError, "num_patches: expected shape"),
        ("cu_patches", PADDED.cu_patches[:2], ValueError, "cu_patches: expected shape"),
        ("overflow", PADDED.overflow.to("meta"), ValueError, "overflow: expected device cpu"),
    ]:
        with pytest.raises(error, match="PatchLayout.validate: " + message):
            dataclasses.replace(PADDED, **{field: tensor}).validate()


@pytest.mark.parametrize("field", FIELDS)
def test_ops_refuse_a_layout_with_a_field_that_does_not_fit(field):
    """A field on another device would make the dispatcher take the fake kernel: memory that nobody wrote."""
    layout = from_lengths(torch.tensor([[1, 4, 3], [2, 2, 2]]), 8)
    x, y, heads = torch.randn(2, 8, 4), torch.randn(2, 3, 4), torch.randn(2, 8, 1, 4)
    calls = {
        "patch_pool": lambda bad: patch_pool(x, bad),
        "patch_gather": lambda bad: patch_gather(y, bad),
        "encoder_cross_attention": lambda bad: encoder_cross_attention(y[:, :, None], heads, heads, bad),
        "decoder_cross_attention": lambda bad: decoder_cross_attention(heads, y[:, :, None], y[:, :, None], bad),
    }
    value = getattr(layout, field)
    for op, call in calls.items():
        for wrong, error, message in (
            (value.to("meta"), ValueError, "expected device cpu"),
            (value.long(), TypeError, "expected dtype int32"),
            (value[None], ValueError, "dimensions"),
        ):
            with pytest.raises(error, match=f"^{op}: layout.{field}: .*{message}"):
                call(dataclasses.replace(layout, **{field: wrong}))


def test_to_takes_a_device_alone():
    layout = from_lengths(torch.tensor([[1, 4]]), 5)
    assert layout.to("cpu").offsets is layout.offsets
    with pytest.raises(TypeError, match=r"PatchLayout.to: device: expected a device, got torch.int64"):
        layout.to(torch.int64)


def test_export_and_loading_of_weights_only(tmp_path):
    class Pool(torch.nn.Module):
        def forward(self, x, layout):
            return patch_pool(x, layout)

    layout, x = from_lengths(torch.tensor([[1, 4]]), 5), torch.randn(1, 5, 4)
    torch.export.save(torch.export.export(Pool(), (x, layout)), tmp_path / "pool.pt2")
    exported = torch.export.load(tmp_path / "pool.pt2").module()
    assert torch.equal(exported(x, layout), patch_pool(x, layout))
    torch.save(layout, tmp_path / "layout.pt")
    assert_same(torch.load(tmp_path / "layout.pt", weights_only=True), layout)


def test_forward_mode_derivatives_are_refused_and_left_to_the_reference():
    layout, x = from_lengths(torch.tensor([[1, 4]]), 5), torch.randn(1, 5, 4)
    with pytest.raises(NotImplementedError, match=r"patch_pool has no forward-mode derivative"):
        torch.func.jvp(lambda z: patch_pool(z, layout, "mean"), (x,), (torch.ones_like(x),))
    with use_backend("reference"):
        _, tangent = torch.func.jvp(lambda z: patch_pool(z, layout, "mean"), (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, torch.ones_like(tangent))
