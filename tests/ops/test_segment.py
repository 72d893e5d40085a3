"""segment, segment_spaces, segment_fixed, calibrate_threshold: published values, an independent oracle, stability."""

from __future__ import annotations

import itertools
import math

import layout_oracle as oracle
import numpy as np
import pytest
import torch
import torch._dynamo.testing
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
from layout_oracle import assert_fields, assert_same

from blt_kernels import calibrate_threshold, patch_pool, segment, segment_fixed, segment_spaces, use_backend

BACKENDS = ("cpu", "reference")
RULES = [("threshold", None), ("monotonic", None), ("combined", 0.5)]
# e of the published golden table; its last value decides about the byte after it.
GOLDEN = [5, 1, 1.5, 3, 3.2, 9, 9.5, 0.1, 4, 4.1]
INF, NAN = math.inf, math.nan


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def row(values: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([values], dtype=dtype)


def lengths_of(layout, with_next: bool = False) -> list[int]:
    """Patch lengths of the only row; with the unseen next byte, as the published `include_next_token` has it."""
    lengths = layout.lengths()[0, : int(layout.num_patches)].tolist()
    if with_next and layout.visible_ids[0, -1] == layout.patch_ids[0, -1]:
        lengths.append(1)
    elif with_next:
        lengths[-1] += 1
    return lengths


# ---- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "lengths", "with_next"),
    [
        ("threshold", [1, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 1, 2, 1, 1]),
        ("monotonic", [1, 1, 2, 2, 3, 1], [1, 1, 2, 2, 3, 2]),
    ],
)
def test_published_lengths(backend, rule, lengths, with_next):
    layout = segment(row(GOLDEN), 1.0, rule=rule)
    assert lengths_of(layout) == lengths
    assert lengths_of(layout, with_next=True) == with_next


@pytest.mark.parametrize("rule, delta", RULES)
def test_one_byte(backend, rule, delta):
    layout = segment(row([0.0]), 1.0, rule=rule, delta=delta)
    assert lengths_of(layout, with_next=True) == [1, 1]
    assert layout.visible_ids.tolist() == [[0]]
    layout = segment(row([0.0]), 1.0, rule=rule, delta=delta, bos_patch=False)
    assert layout.visible_ids.tolist() == [[-1]]


def test_combined_is_both_rules_without_the_accident(backend):
    # Position 2 is forced; position 3 starts on its own merits: e[2] = 3 > 1 and a rise of 2 > 0.5.
    e = row([0, 1, 3, 3.2, 0.5, 1.4, 9])
    layout = segment(e, 1.0, rule="combined", delta=0.5)
    assert lengths_of(layout) == [1, 1, 1, 3, 1]
    # Above but not rising (3.2), rising but not above (0.5 -> 0.9): no start.
    assert lengths_of(segment(row([0, 1, 3, 3.2, 0.5, 0.9]), 1.0, rule="combined", delta=0.3)) == [1, 1, 1, 3]
    assert lengths_of(segment(e, 1.0, rule="combined", delta=0.5), with_next=True) == [1, 1, 1, 3, 1, 1]


def test_without_a_bos_patch_the_first_entropy_counts(backend):
    e = row([2, 2, 0, 3])
    assert lengths_of(segment(e, 1.0, bos_patch=False)) == [1, 1, 2]
    assert lengths_of(segment(row([0, 0, 0, 0]), 1.0, bos_patch=False)) == [4]
    # Differences from e[1] - e[0] on, and nothing is forced.
    assert lengths_of(segment(row([9, 1, 3, 3]), 1.0, rule="monotonic", bos_patch=False)) == [3, 1]
    assert lengths_of(segment(row([0, 2, 3, 3]), 1.0, rule="monotonic", bos_patch=False)) == [2, 2]
    assert lengths_of(segment(row([0, 2, 3, 3]), 1.0, rule="combined", delta=0.9, bos_patch=False)) == [2, 1, 1]


@pytest.mark.parametrize(
    ("e", "m", "lengths", "with_next"),
    [
        ([0] * 9, 4, [1, 4, 4], [1, 4, 4, 1]),  # n = 2m, and finished by its length
        ([0] * 8, 4, [1, 4, 3], [1, 4, 4]),
        ([0] * 3 + [2] + [0] * 6, 3, [1, 3, 3, 3], [1, 3, 3, 3, 1]),  # cut within the patches of the rule
        ([0] * 4 + [2] + [0] * 3, 3, [1, 3, 1, 3], [1, 3, 1, 3, 1]),
        ([0] * 4, 1, [1, 1, 1, 1], [1, 1, 1, 1, 1]),
        ([0] * 4, 100, [1, 3], [1, 4]),
    ],
)
def test_max_patch_length_cuts_from_the_left(backend, e, m, lengths, with_next):
    layout = segment(row(e), 1.0, max_patch_length=m)
    assert lengths_of(layout) == lengths
    assert lengths_of(layout, with_next=True) == with_next


def test_strictly_above_in_fp32(backend):
    t = 1.335442066192627  # the released threshold: an fp32 number
    assert lengths_of(segment(row([0, t, np.nextafter(np.float32(t), np.float32(2)), 0]), t)) == [1, 2, 1]
    # The threshold is rounded to fp32: 0.1 in fp32 is above 0.1 in fp64, and not above itself.
    assert lengths_of(segment(row([0, 0.1, 0.1, 0.1]), 0.1)) == [1, 3]
    # fp64 entropies are rounded too.
    assert lengths_of(segment(row([0, 0.1 + 1e-12, 0.1, 0.1], torch.float64), 0.1)) == [1, 3]
    # 1 - 0.9 is 0.100000024 in fp32, above 0.1; differences are fp32 differences.
    assert lengths_of(segment(row([0, 0.9, 1, 0]), 0.1, rule="monotonic")) == [1, 1, 1, 1]
    assert lengths_of(segment(row([0, 0.9, 1, 0]), 0.10000003, rule="monotonic")) == [1, 1, 2]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dtypes_are_compared_in_fp32(backend, dtype):
    e = (torch.rand(2, 300, dtype=torch.float64) * 3).to(dtype)
    for rule, delta in RULES:
        assert_same(segment(e, 1.2, rule=rule, delta=delta), segment(e.float(), 1.2, rule=rule, delta=delta))


def test_nan_starts_no_patch_and_infinity_does(backend):
    assert lengths_of(segment(row([NAN, NAN, 2, NAN, INF, -INF, 0]), 1.0)) == [1, 2, 2, 2]
    # A difference of equal infinities is NaN.
    assert lengths_of(segment(row([0, 0, INF, INF, -INF, 0, 0]), 1.0, rule="monotonic")) == [1, 1, 1, 3, 1]
    assert lengths_of(segment(row([1, 2, INF]), INF)) == [1, 2]
    assert lengths_of(segment(row([1, -INF, 2]), -INF)) == [1, 2]


@pytest.mark.parametrize(
    ("text", "lengths"), [("ab cd, ef", [1, 3, 3, 4]), ("日本 x", [1, 4, 3, 2]), ("", [1, 1]), ("x", [1, 2])]
)
def test_published_spaces(backend, text, lengths):
    tokens = torch.tensor([[1, *(byte + 4 for byte in text.encode()), 2]])
    layout = segment_spaces(tokens)
    assert lengths_of(layout) == lengths
    assert lengths_of(layout, with_next=True) == [*lengths, 1]  # EOS ends a patch
    assert_same(segment_spaces(tokens.int()), layout)


def test_spaces_of_raw_bytes(backend):
    tokens = torch.tensor([list(b" ab  c_d")])
    assert lengths_of(segment_spaces(tokens, byte_offset=0, bos_patch=False)) == [4, 3, 1]
    assert lengths_of(segment_spaces(tokens, byte_offset=0)) == [1, 3, 3, 1]
    # A special token at position 0 ends its patch without any forcing.
    assert lengths_of(segment_spaces(torch.tensor([[1, 101, 102]]), bos_patch=False)) == [1, 2]


def test_every_byte_is_spacelike_or_not(backend):
    """One byte between letters: the patch ends after it exactly if it is space-like."""
    byte = torch.arange(256)
    tokens = torch.stack([torch.full_like(byte, ord("a")), byte, torch.full_like(byte, ord("a"))], dim=1)
    patches = segment_spaces(tokens, byte_offset=0, bos_patch=False).num_patches
    letters = {*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1), *range(ord("0"), ord("9") + 1)}
    assert [b for b in range(256) if patches[b] == 1] == sorted(letters | set(range(0x80, 0xC0)))


def test_tokens_at_the_ends_of_int64(backend):
    tokens = torch.tensor([[2**63 - 1, -(2**63), 100, 2**63 - 1, 100]])
    assert lengths_of(segment_spaces(tokens, byte_offset=0)) == [1, 1, 2, 1]


def test_fixed(backend):
    tokens = torch.zeros(1, 10, dtype=torch.int64)
    assert lengths_of(segment_fixed(tokens, 4)) == [1, 4, 4, 1]
    assert lengths_of(segment_fixed(tokens, 4, bos_patch=False)) == [4, 4, 2]
    assert lengths_of(segment_fixed(tokens[:, :9], 4), with_next=True) == [1, 4, 4, 1]
    assert lengths_of(segment_fixed(tokens[:, :8], 4), with_next=True) == [1, 4, 4]
    assert lengths_of(segment_fixed(tokens, 1)) == [1] * 10
    assert lengths_of(segment_fixed(tokens, 4, max_patch_length=3)) == [1, 3, 1, 3, 1, 1]
    layout = segment_fixed(tokens, 2, cu_seqlens=torch.tensor([0, 4, 4, 9]))
    assert lengths_of(layout) == [1, 2, 1, 1, 2, 2]


# ---- any batch -------------------------------------------------------------------------------------------------------

VALUES = st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.3, 2.0, 2.6, NAN, INF, -INF])


@st.composite
def options(draw: st.DrawFn, batch: int, num_bytes: int) -> dict:
    """The options of segment* in plain Python."""
    out: dict = {"seq_lens": None, "cu_seqlens": None, "bos_patch": draw(st.booleans()), "capacity": None}
    out["max_patch_length"] = draw(st.one_of(st.none(), st.integers(1, 5)))
    in_row = 1
    if batch == 1 and draw(st.booleans()):
        out["cu_seqlens"] = [0, *sorted(draw(st.lists(st.integers(0, num_bytes), min_size=1, max_size=5)))]
        in_row = len(out["cu_seqlens"]) - 1
    elif draw(st.booleans()):
        out["seq_lens"] = [draw(st.integers(0, num_bytes)) for _ in range(batch)]
    if draw(st.booleans()):
        out["capacity"] = in_row + draw(st.integers(0, 5))
    return out


def keywords(options: dict) -> dict:
    """The same for the library: tensors."""
    return {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}


def expected_fields(batch: int, num_bytes: int, options: dict, starts_of) -> dict[str, list]:
    """`starts_of(b, begin, end)`: the starts of these bytes and the decision about the next one."""
    mask = [[False] * num_bytes for _ in range(batch)]
    next_is_start = []
    for b, begin, end in oracle.ranges(batch, num_bytes, options["seq_lens"], options["cu_seqlens"]):
        starts, following = starts_of(b, begin, end)
        mask[b][begin:end] = starts
        next_is_start.append(following)
    return oracle.from_starts(
        mask, num_bytes, options["seq_lens"], options["cu_seqlens"], next_is_start, options["capacity"]
    )


@given(st.integers(1, 3), st.integers(0, 24), st.sampled_from(RULES), st.data())
def test_segment_matches_oracle(batch, num_bytes, rule_and_delta, data):
    (rule, delta), opts = rule_and_delta, data.draw(options(batch, num_bytes))
    values = st.lists(VALUES, min_size=num_bytes, max_size=num_bytes)
    e = torch.tensor([data.draw(values) for _ in range(batch)], dtype=torch.float32).reshape(batch, num_bytes)
    threshold = data.draw(st.sampled_from([-INF, 0.3, 0.7, 1.0, INF]))

    def starts_of(b: int, begin: int, end: int) -> tuple[list[bool], bool]:
        return oracle.entropy_starts(
            e.numpy()[b, begin:end], threshold, rule, delta, opts["max_patch_length"], opts["bos_patch"]
        )

    expected = expected_fields(batch, num_bytes, opts, starts_of)
    for name in BACKENDS:
        with use_backend(name):
            layout = segment(e, threshold, rule=rule, delta=delta, **keywords(opts))
            assert_fields(layout, expected)
            assert_same(segment(awkward_view(e), threshold, rule=rule, delta=delta, **keywords(opts)), layout)
            layout.validate()


@given(st.integers(1, 3), st.integers(0, 24), st.integers(0, 4), st.data())
def test_spaces_match_oracle(batch, num_bytes, byte_offset, data):
    opts = data.draw(options(batch, num_bytes))
    token = st.sampled_from([*range(6), *(byte + byte_offset for byte in b" .09AZaz_\x7f\x80\xbf\xc0\xff"), -1, 300])
    values = st.lists(token, min_size=num_bytes, max_size=num_bytes)
    tokens = torch.tensor([data.draw(values) for _ in range(batch)], dtype=torch.int64).reshape(batch, num_bytes)

    def starts_of(b: int, begin: int, end: int) -> tuple[list[bool], bool]:
        row = tokens[b, begin:end].tolist()
        return oracle.space_starts(row, byte_offset, opts["max_patch_length"], opts["bos_patch"])

    expected = expected_fields(batch, num_bytes, opts, starts_of)
    for name in BACKENDS:
        with use_backend(name):
            assert_fields(segment_spaces(tokens, byte_offset=byte_offset, **keywords(opts)), expected)
            assert_fields(segment_spaces(awkward_view(tokens), byte_offset=byte_offset, **keywords(opts)), expected)


@given(st.integers(1, 3), st.integers(0, 24), st.integers(1, 7), st.data())
def test_fixed_matches_oracle(batch, num_bytes, patch_size, data):
    opts = data.draw(options(batch, num_bytes))

    def starts_of(b: int, begin: int, end: int) -> tuple[list[bool], bool]:
        return oracle.fixed_starts(end - begin, patch_size, opts["max_patch_length"], opts["bos_patch"])

    expected = expected_fields(batch, num_bytes, opts, starts_of)
    for name in BACKENDS:
        with use_backend(name):
            assert_fields(segment_fixed(torch.zeros(batch, num_bytes), patch_size, **keywords(opts)), expected)


@given(st.data())
def test_the_patches_of_a_prefix_are_the_prefix_of_the_patches(data):
    num_bytes = data.draw(st.integers(2, 40))
    e = torch.rand(1, num_bytes, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) * 2
    tokens = (e * 130).long()
    bos_patch, m = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1, 3]))
    rule, delta = data.draw(st.sampled_from(RULES))
    cut = {
        "segment": lambda n: segment(e[:, :n], 0.8, rule=rule, delta=delta, bos_patch=bos_patch, max_patch_length=m),
        "spaces": lambda n: segment_spaces(tokens[:, :n], bos_patch=bos_patch, max_patch_length=m),
        "fixed": lambda n: segment_fixed(tokens[:, :n], 3, bos_patch=bos_patch, max_patch_length=m),
    }[data.draw(st.sampled_from(["segment", "spaces", "fixed"]))]
    whole = cut(num_bytes)
    for n in range(1, num_bytes):
        prefix = cut(n)
        assert torch.equal(prefix.patch_ids, whole.patch_ids[:, :n])
        # The last byte too: the unseen byte's decision is the one that is made when it is seen.
        assert torch.equal(prefix.visible_ids, whole.visible_ids[:, :n])


@pytest.mark.parametrize("rule, delta", RULES)
def test_packed_sequences_are_segmented_alone(rule, delta):
    e = torch.rand(1, 200) * 2
    cu = [0, 1, 3, 3, 90, 200]
    packed = segment(e, 0.9, rule=rule, delta=delta, max_patch_length=9, cu_seqlens=torch.tensor(cu))
    for s, (begin, end) in enumerate(itertools.pairwise(cu)):
        alone = segment(e[:, begin:end], 0.9, rule=rule, delta=delta, max_patch_length=9)
        first = int(packed.cu_patches[s])
        assert int(packed.cu_patches[s + 1]) - first == int(alone.num_patches)
        assert torch.equal(packed.patch_ids[:, begin:end] - first, alone.patch_ids)
        visible = packed.visible_ids[:, begin:end]
        assert torch.equal(torch.where(visible < 0, -1, visible - first), alone.visible_ids)


@pytest.mark.parametrize("rule, delta", RULES)
def test_long_rows_are_the_same_on_every_backend(rule, delta, poisoned_memory):
    e, seq_lens = torch.rand(3, 5000) * 2, torch.tensor([5000, 4999, 17])
    for m in (None, 8):
        layout = segment(e, 1.1, rule=rule, delta=delta, max_patch_length=m, seq_lens=seq_lens, capacity=2000)
        with use_backend("reference"):
            assert_same(
                layout,
                segment(e, 1.1, rule=rule, delta=delta, max_patch_length=m, seq_lens=seq_lens, capacity=2000),
            )


# ---- the ops under torch's eyes --------------------------------------------------------------------------------------


def test_opcheck():
    e, cu = torch.rand(1, 9), torch.tensor([0, 4, 4, 7])
    opcheck("segment", (e, 0.5, "threshold", None, None, None, cu, True, 5))
    opcheck("segment", (torch.rand(3, 9), 0.5, "combined", 0.1, 4, torch.tensor([9, 0, 4]), None, False, None))
    opcheck("segment_spaces", (torch.randint(0, 260, (2, 9)), 4, 3, None, None, True, None))
    opcheck("segment_fixed", (torch.zeros(2, 9), 4, None, None, None, True, 3))


def test_gradients_stop_here():
    e = torch.rand(1, 9, requires_grad=True)
    for leaf in pytree.tree_leaves(segment(e, 0.5)):
        assert not leaf.requires_grad


def test_compiles_once_over_raggedness():
    @torch.compile(fullgraph=True)
    def pooled(e, tokens, seq_lens):
        a = segment(e, 0.8, max_patch_length=6, seq_lens=seq_lens, capacity=30)
        b = segment_spaces(tokens, seq_lens=seq_lens)
        c = segment_fixed(tokens, 4, seq_lens=seq_lens, capacity=7)
        return a, b, c, patch_pool(e[..., None], a)

    def check(seed: int) -> None:
        e = torch.rand(2, 32, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
        tokens, seq_lens = (e * 100).long(), torch.tensor([32, 5 * seed])
        a, b, c, out = pooled(e, tokens, seq_lens)
        assert_same(a, segment(e, 0.8, max_patch_length=6, seq_lens=seq_lens, capacity=30))
        assert_same(b, segment_spaces(tokens, seq_lens=seq_lens))
        assert_same(c, segment_fixed(tokens, 4, seq_lens=seq_lens, capacity=7))
        assert torch.equal(out, patch_pool(e[..., None], a))

    with assert_no_recompile():
        for seed in range(5):
            check(seed)


def test_compiled_packed_batches_of_any_size():
    """dynamic=True: neither N nor S compiles it again."""
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def packed(e, cu_seqlens):
        return segment(e, 0.5, cu_seqlens=cu_seqlens)

    torch._dynamo.reset()
    for n in (16, 17, 90):
        e, cu = torch.rand(1, n), torch.arange(0, n, 5)
        assert_same(packed(e, cu), segment(e, 0.5, cu_seqlens=cu))
    assert counter.frame_count == 1


def test_threads_do_not_change_it():
    e = torch.rand(6, 20000)
    assert_same_for_any_threads(
        lambda: pytree.tree_leaves(segment(e, 0.8, rule="combined", delta=0.1, max_patch_length=9))
    )


@pytest.mark.parametrize("capability", CPU_CAPABILITIES)
def test_every_capability(capability):
    """This covers the layout kernels too, because every rule fills a layout."""
    run_with_capability(
        """
        from blt_kernels import PatchLayout, segment, segment_fixed, segment_spaces, use_backend
        from layout_oracle import assert_same
        e = torch.rand(2, 213, generator=torch.Generator().manual_seed(0)) * 3
        lens, cu = torch.tensor([213, 150]), torch.tensor([0, 70, 70, 200])
        def make():
            for options in ({"max_patch_length": 5, "seq_lens": lens, "capacity": 40}, {"bos_patch": False}):
                for rule in ("threshold", "monotonic"):
                    yield segment(e, 1.1, rule=rule, **options)
                yield segment(e, 1.1, rule="combined", delta=0.2, **options)
                yield segment_spaces((e * 86).long(), **options)
                yield segment_fixed(e, 7, **options)
            yield segment(e[:1], 1.1, cu_seqlens=cu)
            yield PatchLayout.from_lengths(torch.tensor([[0, 70, 40, 0, 1]]), 213, cu_seqlens=cu)
        with use_backend("reference"):
            expected = list(make())
        for a, b in zip(make(), expected, strict=True):
            assert_same(a, b)
        """,
        capability,
    )


def test_inference_mode_and_meta():
    with torch.inference_mode():
        assert lengths_of(segment(row(GOLDEN), 1.0)) == [1, 2, 1, 1, 1, 1, 2, 1]
    for layout in (
        segment(torch.rand(2, 9, device="meta"), 1.0, rule="combined", delta=1.0, max_patch_length=3, capacity=4),
        segment_spaces(torch.zeros(2, 9, dtype=torch.int64, device="meta"), capacity=4),
        segment_fixed(torch.rand(2, 9, device="meta"), 3, capacity=4),
    ):
        assert layout.offsets.shape == (2, 5)
        assert layout.visible_ids.shape == (2, 9)


# ---- calibrate_threshold ---------------------------------------------------------------------------------------------


def mean_length(e: torch.Tensor, threshold: float, **options) -> float:
    layout = segment(e, threshold, **options)
    return int((layout.patch_ids >= 0).sum()) / int(layout.num_patches.sum())


@pytest.mark.parametrize("rule, delta", [("threshold", None), ("monotonic", None), ("combined", 0.05)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_patch_length": 12, "bos_patch": False},
        {"seq_lens": torch.tensor([3000, 1700])},
        {"cu_seqlens": torch.tensor([0, 1000, 1000, 2500])},
    ],
    ids=["plain", "max_patch_length", "seq_lens", "cu_seqlens"],
)
def test_calibrated_threshold_gives_the_mean_length(backend, rule, delta, options):
    e = torch.rand(2, 3000) ** 2 * 4
    e = e[:1] if "cu_seqlens" in options else e
    options = {"rule": rule, "delta": delta, **options}
    threshold = calibrate_threshold(e, 4.5, **options)
    assert isinstance(threshold, float)
    assert threshold == float(np.float32(threshold))
    assert abs(mean_length(e, threshold, **options) - 4.5) < 0.02


@pytest.mark.parametrize("rule, delta", [("threshold", None), ("monotonic", None), ("combined", 0.5)])
@pytest.mark.parametrize("m", [None, 3])
def test_no_other_threshold_comes_nearer(rule, delta, m):
    values = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5, 2.0])
    e = values[torch.randint(0, 6, (1, 40))]
    options = {"rule": rule, "delta": delta, "max_patch_length": m}
    means = {t: mean_length(e, t, **options) for t in (-INF, -9, *torch.arange(-2.0, 2.3, 0.125).tolist(), INF)}
    for wanted in sorted({*means.values(), *(sum(p) / 2 for p in itertools.pairwise(sorted(means.values())))}):
        got = mean_length(e, calibrate_threshold(e, wanted, **options), **options)
        assert abs(got - wanted) == min(abs(mean - wanted) for mean in means.values())


def test_calibrated_threshold_lies_between_the_entropies():
    # Three starts by force and rule at 1.0 .. 2.0: the middle, not an entropy that a rounding error would move.
    assert calibrate_threshold(row([0, 1, 2, 1, 1, 1]), 2.0) == 1.5
    # Without a middle in fp32, the lower one.
    high = float(np.nextafter(np.float32(1), np.float32(2)))
    assert calibrate_threshold(row([0, 1, high, 1, 1, 1]), 2.0) == 1.0
    # At the ends of the range, and with values that are no numbers or not finite.
    low = calibrate_threshold(row([0, 1, 2, 1]), 1.0)
    assert lengths_of(segment(row([0, 1, 2, 1]), low)) == [1, 1, 1, 1]
    assert math.isfinite(low)
    high = calibrate_threshold(row([0, 1, 2, 1]), 2.0)
    assert lengths_of(segment(row([0, 1, 2, 1]), high)) == [1, 3]
    odd = row([0, NAN, INF, -INF, 1, 0])
    assert lengths_of(segment(odd, calibrate_threshold(odd, 2.0))) == [1, 2, 3]
    assert calibrate_threshold(row([NAN, NAN, NAN, NAN]), 2.0) == 0.0


def test_calibration_out_of_reach():
    e = torch.rand(1, 100)
    with pytest.raises(ValueError, match=r"calibrate_threshold: patch_size: .*reaches here, 1 \.\. 50, got 51$"):
        calibrate_threshold(e, 51)
    with pytest.raises(ValueError, match=r"reaches here, 1 \.\. 4, got 0.5"):
        calibrate_threshold(e, 0.5, max_patch_length=4, bos_patch=False)
    for empty in (torch.rand(1, 0), torch.rand(0, 4)):
        with pytest.raises(ValueError, match="calibrate_threshold: entropies: expected at least one real byte"):
            calibrate_threshold(empty, 4)


# ---- errors ----------------------------------------------------------------------------------------------------------

E, TOKENS = torch.rand(2, 5), torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: segment([1.0], 1.0), TypeError, "segment: entropies: expected a torch.Tensor, got list"),
        (lambda: segment(TOKENS, 1.0), TypeError, "segment: entropies: expected dtype float32 or .*, got int64"),
        (lambda: segment(E[0], 1.0), ValueError, r"segment: entropies: expected 2 dimensions, got shape \(5,\)"),
        (lambda: segment(E.to_sparse(), 1.0), TypeError, "segment: entropies: expected a dense"),
        (lambda: segment(E, torch.tensor(1.0)), TypeError, "segment: threshold: expected a float, got torch.Tensor"),
        (lambda: segment(E, NAN), ValueError, "segment: threshold: expected a number, got nan"),
        (lambda: segment(E, 10**400), ValueError, "segment: threshold: expected a number in the range of floats"),
        (lambda: segment(E, 1.0, rule=["slope"]), ValueError, "segment: rule: expected one of 'threshold'"),
        (
            lambda: segment(E, 1.0, rule="slope"),
            ValueError,
            "segment: rule: expected one of 'threshold', .*got 'slope'",
        ),
        (lambda: segment(E, 1.0, rule="combined"), TypeError, "segment: delta: expected a float, got NoneType"),
        (lambda: segment(E, 1.0, delta=0.1), ValueError, "segment: delta: expected None with rule='threshold'"),
        (lambda: segment(E, 1.0, max_patch_length=0), ValueError, "segment: max_patch_length: expected 1 .. .*, got 0"),
        (lambda: segment(E, 1.0, max_patch_length=2.5), TypeError, "segment: max_patch_length: expected an int"),
        (lambda: segment(E, 1.0, bos_patch=None), TypeError, "segment: bos_patch: expected a bool, got NoneType"),
        (lambda: segment(E, 1.0, capacity=0), ValueError, "segment: capacity: expected at least 1, one slot"),
        (lambda: segment(E, 1.0, cu_seqlens=torch.tensor([0, 5])), ValueError, r"segment: entropies: .* got B = 2"),
        (lambda: segment_spaces(E), TypeError, "segment_spaces: tokens: expected dtype int32 or int64, got float32"),
        (lambda: segment_spaces(TOKENS, byte_offset=-1), ValueError, "segment_spaces: byte_offset: expected 0 .. "),
        (lambda: segment_spaces(TOKENS, seq_lens=5), TypeError, "segment_spaces: seq_lens: expected a torch.Tensor"),
        (lambda: segment_fixed(TOKENS, 0), ValueError, "segment_fixed: patch_size: expected 1 .. .*, got 0"),
        (lambda: segment_fixed(TOKENS, 4.5), TypeError, "segment_fixed: patch_size: expected an int, got float"),
        (lambda: segment_fixed(TOKENS[0], 4), ValueError, "segment_fixed: tokens: expected 2 dimensions"),
        (lambda: calibrate_threshold(TOKENS, 4), TypeError, "calibrate_threshold: entropies: expected dtype"),
        (lambda: calibrate_threshold(E.to("meta"), 4), ValueError, "calibrate_threshold: entropies: .* with values"),
        (lambda: calibrate_threshold(E, "4"), TypeError, "calibrate_threshold: patch_size: expected a float, got str"),
        (lambda: calibrate_threshold(E, 4, rule="combined"), TypeError, "calibrate_threshold: delta: expected a float"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match="^" + message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_lens": torch.tensor([5, 6])}, "segment: seq_lens: expected values in 0 .. 5, got 6"),
        ({"cu_seqlens": torch.tensor([0, 3, 2])}, "segment: cu_seqlens: expected values that rise from 0 to at most 5"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "segment: cu_seqlens: expected values that rise from 0 to at most 5"),
        ({"cu_seqlens": torch.tensor([-1, 5])}, "segment: cu_seqlens: expected"),
    ],
)
def test_value_errors_raise_on_the_cpu(backend, options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        segment(E if "seq_lens" in options else E[:1], 1.0, **options)


def test_registered_ops_check_again():
    ops, rest = torch.ops.blt_kernels, (None, None, None, True, None)
    for call, message in [
        (lambda: ops.segment(E[0], 1.0, "threshold", None, *rest), "segment: entropies: expected 2 dimensions, got 1"),
        (lambda: ops.segment(E.double(), 1.0, "threshold", None, *rest), "segment: entropies: expected dtype float32"),
        (lambda: ops.segment(E, 1.0, "slope", None, *rest), "segment: rule: expected threshold, monotonic or combined"),
        (lambda: ops.segment(E, 1.0, "combined", None, *rest), "segment: delta: expected"),
        (lambda: ops.segment(E, 1.0, "threshold", None, 0, None, None, True, None), "max_patch_length: expected at"),
        (lambda: ops.segment(E, 1.0, "threshold", None, None, None, None, True, 0), "capacity: expected at least 1"),
        (lambda: ops.segment_spaces(TOKENS.int(), 4, *rest), "segment_spaces: tokens: expected dtype int64"),
        (lambda: ops.segment_fixed(TOKENS, 0, *rest), "segment_fixed: patch_size: expected at least 1, got 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
