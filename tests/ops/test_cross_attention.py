"""encoder_cross_attention and decoder_cross_attention: values, gradients, windows, packed rows and special values."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    CPU_CAPABILITIES,
    FLOAT_DTYPES,
    HUGE_PATCH,
    RAGGED,
    assert_as_accurate,
    assert_no_recompile,
    assert_same_for_any_threads,
    awkward_view,
    lengths_of,
    make_layout,
    opcheck,
    ragged_lengths,
    random_lengths,
    run_with_capability,
)
from hypothesis import given
from hypothesis import strategies as st

import blt_kernels
from blt_kernels import PatchLayout, decoder_cross_attention, encoder_cross_attention, reference, use_backend

INF, NAN = math.inf, math.nan
OPS = ("encoder", "decoder")
# K, H, Hkv, E, window: tiles of every size, grouped queries, heads narrower and wider than registers, odd widths.
SHAPES = [(2, 2, 2, 64, 1), (1, 4, 2, 7, 1), (3, 4, 2, 64, 2), (4, 3, 3, 16, 100), (5, 4, 1, 1, 3), (2, 1, 1, 150, 1)]
# Sequences of 4, 0, 5 and 4 bytes in one row, the last one closed; an unused slot and 2 bytes of padding at the end.
PACKED = PatchLayout.from_lengths(
    torch.tensor([[1, 0, 3, 2, 1, 2, 1, 3, 0]]),
    15,
    cu_seqlens=torch.tensor([0, 4, 4, 9, 13]),
    next_is_start=torch.tensor([False, False, False, True]),
)
LEFT_PADDED = PatchLayout.from_starts(
    torch.tensor([[0, 0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]]).bool(), capacity=4
)


def ours(op: str):
    return getattr(blt_kernels, f"{op}_cross_attention")


def definition(op: str):
    return getattr(reference, f"{op}_cross_attention")


def inputs(op: str, layout: PatchLayout, shape: tuple, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v."""
    slots, heads, key_heads, width, _ = shape
    rows = (layout.capacity * slots, layout.num_bytes)
    q_rows, kv_rows = rows if op == "encoder" else rows[::-1]
    batch = layout.offsets.shape[0]
    sizes = ((q_rows, heads), (kv_rows, key_heads), (kv_rows, key_heads))
    return [torch.randn(batch, n, h, width).to(dtype) for n, h in sizes]


def with_gradients(fn, tensors, layout: PatchLayout, grad: torch.Tensor, **options) -> list[torch.Tensor]:
    """The result and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = fn(*leaves, layout, **options)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def layout_tensors(op: str, layout: PatchLayout) -> list[torch.Tensor]:
    """What the registered op takes of the layout."""
    shared = [layout.offsets, layout.cu_patches]
    return shared if op == "encoder" else [layout.visible_ids, *shared]


def visible(op: str, layout: PatchLayout, window: int) -> list[list[list[int]]]:
    """[B][query row, K = 1] -> the key rows that it sees, by the words of the documentation."""
    offsets, ids = layout.offsets.tolist(), layout.visible_ids.tolist()
    capacity, cu = layout.capacity, layout.cu_patches.tolist()
    result = []
    for b in range(len(offsets)):
        starts = [0] if len(offsets) > 1 else cu

        def patches(last: int, starts: list[int] = starts) -> range:
            first = max(s for s in starts if s <= last)
            return range(max(first, last - window + 1), last + 1)

        rows: list[list[int]] = []
        if op == "encoder":
            for p in range(capacity):
                own = range(offsets[b][p], offsets[b][p + 1])
                rows.append([i for c in patches(p) for i in range(offsets[b][c], offsets[b][c + 1])] if own else [])
        else:
            rows = [list(patches(last)) if last >= 0 else [] for last in ids[b]]
        result.append(rows)
    return result


def assert_accurate(op: str, layouts, shape: tuple, dtype: torch.dtype) -> None:
    """Values and gradients over all the layouts together: a maximum over few elements would say little.

    Narrow heads in fp32 have few values of wide spread, where even so the larger of two maxima is chance: they are held
    to a fixed tolerance.
    """
    results = []
    for layout in layouts:
        tensors = inputs(op, layout, shape, dtype)
        grad = torch.randn_like(tensors[0])
        runs = (
            with_gradients(ours(op), tensors, layout, grad, window=shape[4]),
            with_gradients(definition(op), tensors, layout, grad, window=shape[4]),
            with_gradients(definition(op), [x.double() for x in tensors], layout, grad, window=shape[4]),
        )
        results.append([[x.flatten() for x in run] for run in runs])
    for i, name in enumerate(("out", "grad_q", "grad_k", "grad_v")):
        actual, eager, exact = (torch.cat([result[run][i] for result in results]) for run in range(3))
        if dtype == torch.float32 and shape[3] < 64:
            torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=4e-6)
            continue
        assert_as_accurate(actual, eager, exact, f"{op} {dtype} {shape} {name}")


def check_everything() -> None:
    """What the tests of one processor's kernels run."""
    layouts = [make_layout(lengths_of(name)) for name in ("inner_empty", "unequal_rows", "vector_edges")]
    for op in OPS:
        for shape in SHAPES[:3]:
            for dtype in FLOAT_DTYPES:
                assert_accurate(op, layouts, shape, dtype)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_golden_values() -> None:
    # Lengths of the published example: encoder ids 0,1,2,2,2,3,3, decoder ids 0,1,1,1,2,2,3. Equal scores take means.
    layout = PatchLayout.from_lengths(torch.tensor([[1, 1, 3, 2, 1]]), 7)
    values = torch.tensor([1.0, 2.0, 4.0, 5.0, 9.0, 3.0, 4.0]).view(1, 7, 1, 1)
    zeros = torch.zeros_like(values)
    queries = torch.zeros(1, 10, 1, 1)
    out = encoder_cross_attention(queries, zeros, values, layout)
    assert out.flatten().tolist() == [1, 1, 2, 2, 6, 6, 3.5, 3.5, 0, 0]
    out = encoder_cross_attention(queries, zeros, values, layout, window=2)
    torch.testing.assert_close(out.flatten(), torch.tensor([1, 1, 1.5, 1.5, 5, 5, 5, 5, 0, 0]))
    slots = torch.tensor([1.0, 3.0, 5.0, 9.0, 10.0, 20.0, -4.0, 4.0, NAN, NAN]).view(1, 10, 1, 1)
    out = decoder_cross_attention(zeros, queries, slots, layout)
    assert out.flatten().tolist() == [2, 7, 7, 7, 15, 15, 0]
    out = decoder_cross_attention(zeros, queries, slots, layout, window=2)
    assert out.flatten().tolist() == [2, 4.5, 4.5, 4.5, 11, 11, 7.5]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 2, 3, 100])
@pytest.mark.parametrize("layout", [PACKED, LEFT_PADDED, make_layout(lengths_of("inner_empty"))])
def test_reference_means_what_the_documentation_says(layout: PatchLayout, window: int, op: str) -> None:
    q, k, v = inputs(op, layout, (1, 1, 1, 3, window), torch.float64)
    expected = torch.zeros_like(q)
    for b, rows in enumerate(visible(op, layout, window)):
        for i, keys in enumerate(rows):
            if keys:
                weights = (k[b, keys, 0] @ q[b, i, 0] / math.sqrt(3)).softmax(0)
                expected[b, i, 0] = weights @ v[b, keys, 0]
    torch.testing.assert_close(definition(op)(q, k, v, layout, window=window), expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_layouts(shape: tuple, dtype: torch.dtype, op: str) -> None:
    layouts = [make_layout(lengths_of(name), int(lengths_of(name).sum(1).max()) + 2) for name in RAGGED]
    assert_accurate(op, [*layouts, PACKED, LEFT_PADDED], shape, dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 2])
def test_one_patch_of_16k_bytes(window: int, op: str) -> None:
    layout = make_layout(torch.tensor(HUGE_PATCH))
    assert_accurate(op, [layout], (2, 2, 1, 64, window), torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_many_rows_and_keys_of_one_group_at_once(op: str) -> None:
    # A window over everything: the scores of a block of queries (keys) are held at a time.
    assert_accurate(op, [make_layout(random_lengths(1000, 3.0))], (2, 4, 2, 8, 500), torch.float32)


@given(
    op=st.sampled_from(OPS),
    lengths=ragged_lengths(),
    padding=st.integers(0, 3),
    slots=st.integers(1, 5),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.integers(1, 40),
    window=st.one_of(st.just(1), st.integers(1, 4), st.just(10**12)),
    closed=st.booleans(),
)
def test_any_layout(op, lengths, padding, slots, key_heads, group, width, window, closed) -> None:
    sums = lengths.sum(1)
    layout = PatchLayout.from_lengths(
        lengths, int(sums.max()) + padding, seq_lens=sums, next_is_start=torch.full_like(sums, closed).bool()
    )
    shape = (slots, key_heads * group, key_heads, width, window)
    tensors = inputs(op, layout, shape, torch.float64)
    grad = torch.randn_like(tensors[0])
    actual = with_gradients(ours(op), tensors, layout, grad, window=window)
    expected = with_gradients(definition(op), tensors, layout, grad, window=window)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    single = with_gradients(ours(op), [x.float() for x in tensors], layout, grad, window=window)
    torch.testing.assert_close([x.double() for x in single], expected, rtol=1e-3, atol=1e-4)


@given(op=st.sampled_from(OPS), data=st.data())
def test_packed_sequences_do_not_see_each_other(op: str, data: st.DataObject) -> None:
    """Each sequence of a packed row gives, bit for bit, what it gives alone."""
    length = st.integers(1, 6)
    sequences = data.draw(st.lists(st.lists(length, max_size=5), min_size=1, max_size=4))
    window = data.draw(st.integers(1, 4))
    closed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(sequences), max_size=len(sequences))))
    sizes = torch.tensor([0, *(sum(s) for s in sequences)])
    patches = torch.tensor([length for s in sequences for length in s], dtype=torch.long)[None]
    packed = PatchLayout.from_lengths(patches, int(sizes.sum()), cu_seqlens=sizes.cumsum(0), next_is_start=closed)
    shape = (2, 2, 1, 20, window)
    tensors = inputs(op, packed, shape)
    grad = torch.randn_like(tensors[0])
    together = with_gradients(ours(op), tensors, packed, grad, window=window)
    byte, slot = 0, 0
    for s, lengths in enumerate(sequences):
        if not lengths:
            continue
        alone = PatchLayout.from_lengths(torch.tensor([lengths]), sum(lengths), next_is_start=closed[s : s + 1])
        bytes_, slots = slice(byte, byte + sum(lengths)), slice(2 * slot, 2 * (slot + len(lengths)))
        q_rows, kv_rows = (slots, bytes_) if op == "encoder" else (bytes_, slots)
        parts = [tensors[0][:, q_rows], tensors[1][:, kv_rows], tensors[2][:, kv_rows]]
        separate = with_gradients(ours(op), parts, alone, grad[:, q_rows], window=window)
        for a, b, rows in zip(together, separate, (q_rows, q_rows, kv_rows, kv_rows), strict=True):
            assert torch.equal(a[:, rows], b)
        byte, slot = bytes_.stop, slot + len(lengths)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scale", [0.0, -0.7, 3, 1e-3])
def test_scale(scale: float, op: str) -> None:
    layout = make_layout(lengths_of("typical"))
    tensors = inputs(op, layout, SHAPES[2], torch.float64)
    grad = torch.randn_like(tensors[0])
    actual = with_gradients(ours(op), tensors, layout, grad, scale=scale)
    torch.testing.assert_close(actual, with_gradients(definition(op), tensors, layout, grad, scale=scale))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 3])
def test_log_sum_exp(window: int, op: str) -> None:
    layout = make_layout(lengths_of("leading_empty"), 7)
    q, k, v = inputs(op, layout, (1, 2, 2, 5, window))
    op_of_torch = getattr(torch.ops.blt_kernels, f"{op}_cross_attention")
    lse = op_of_torch(q.requires_grad_(), k, v, *layout_tensors(op, layout), None, window)[1]
    assert lse.dtype == torch.float32 and not lse.requires_grad
    for b, rows in enumerate(visible(op, layout, window)):
        for i, keys in enumerate(rows):
            scores = torch.einsum("he,nhe->nh", q[b, i].detach(), k[b, keys]) / math.sqrt(5)
            torch.testing.assert_close(lse[b, i], scores.logsumexp(0))  # of no keys: -inf


@pytest.mark.parametrize("op", OPS)
def test_a_single_key_is_copied_and_its_score_has_no_gradient(op: str) -> None:
    layout = PatchLayout.from_lengths(torch.ones(1, 9, dtype=torch.long), 8)
    for shape in ((1, 2, 2, 64, 1), (1, 2, 2, 5, 1)):
        q, k, v = inputs(op, layout, shape)
        q *= 10
        out, grad_q, grad_k, grad_v = with_gradients(ours(op), (q, k, v), layout, torch.ones_like(q))
        assert torch.equal(out[:, :8], v[:, :8]) and torch.equal(grad_v[:, :8], torch.ones_like(v[:, :8]))
        assert not grad_q.any() and not grad_k.any()


@pytest.mark.parametrize("op", OPS)
def test_time_and_memory_are_linear(op: str) -> None:
    # A dense mask would have 1.3e10 elements.
    layout = make_layout(random_lengths(200_000, 3.0))
    q, k, v = inputs(op, layout, (1, 1, 1, 2, 1))
    out = ours(op)(q, k, torch.ones_like(v), layout)
    torch.testing.assert_close(out.sum().item(), float((out != 0).sum()), rtol=1e-5, atol=0)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", [PACKED, LEFT_PADDED])
@pytest.mark.parametrize("window", [1, 2])
def test_gradcheck(window: int, layout: PatchLayout, op: str) -> None:
    tensors = [x.requires_grad_() for x in inputs(op, layout, (2, 2, 1, 3, window), torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: ours(op)(*x, layout, window=window), tensors)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_gradients_of_some_inputs(wanted: tuple, window: int, op: str) -> None:
    layout = make_layout(lengths_of("inner_empty"), 9)
    tensors = inputs(op, layout, SHAPES[2])
    grad = torch.randn_like(tensors[0])
    expected = with_gradients(ours(op), tensors, layout, grad, window=window)[1:]
    leaves = [x.clone().requires_grad_(bool(want)) for x, want in zip(tensors, wanted, strict=True)]
    ours(op)(*leaves, layout, window=window).backward(grad)
    for leaf, gradient, want in zip(leaves, expected, wanted, strict=True):
        assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


@pytest.mark.parametrize("op", OPS)
def test_second_derivative_is_an_explained_error(op: str) -> None:
    layout = make_layout(lengths_of("typical"))
    tensors = [x.requires_grad_() for x in inputs(op, layout, SHAPES[0])]
    (grad,) = torch.autograd.grad(ours(op)(*tensors, layout).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}_cross_attention has no second derivative"):
        grad.sum().backward()


# ---- special values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("special", [NAN, INF])
@pytest.mark.parametrize("window", [1, 2])
def test_special_values_reach_only_rows_that_see_them(window: int, special: float, op: str) -> None:
    layout = PACKED
    sees = visible(op, layout, window)[0]
    clean = inputs(op, layout, (1, 1, 1, 5, window))
    grad = torch.randn_like(clean[0])
    expected = with_gradients(ours(op), clean, layout, grad, window=window)
    for argument in range(3):
        for row in range(clean[argument].shape[1]):
            tensors = [x.clone() for x in clean]
            tensors[argument][0, row] = special
            actual = with_gradients(ours(op), tensors, layout, grad, window=window)
            touched = [i for i, keys in enumerate(sees) if (i == row if argument == 0 else row in keys) and keys]
            others = [i for i in range(len(sees)) if i not in touched]
            if special is NAN:
                assert actual[0][0, touched].isnan().all()
            assert torch.equal(actual[0][0, others], expected[0][0, others])
            assert torch.equal(actual[1][0, others], expected[1][0, others])
            # Keys that no touched row sees.
            keys = [j for j in range(clean[1].shape[1]) if not any(j in sees[i] for i in touched)]
            assert torch.equal(actual[2][0, keys], expected[2][0, keys])
            assert torch.equal(actual[3][0, keys], expected[3][0, keys])


def test_infinite_scores_as_in_softmax() -> None:
    layout = make_layout(torch.tensor([[3]]))
    q = torch.ones(1, 1, 1, 1)
    v = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    for scores in ([0.0, -INF, 0.0], [-INF, -INF, -INF], [0.0, INF, 0.0], [0.0, NAN, 0.0], [3e38, -3e38, 3e38]):
        k = torch.tensor(scores).view(1, 3, 1, 1)
        expected = torch.tensor(scores).softmax(0) @ v.flatten()
        out = encoder_cross_attention(q, k, v, layout)
        torch.testing.assert_close(out.flatten()[0], expected, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 2])
def test_every_output_element_is_written(window: int, op: str, poisoned_memory: None) -> None:
    for layout in (PACKED, LEFT_PADDED, *(make_layout(lengths_of(name), 150) for name in RAGGED)):
        for shape in SHAPES[1:3]:
            tensors = inputs(op, layout, shape)
            results = with_gradients(ours(op), tensors, layout, torch.randn_like(tensors[0]), window=window)
            assert all(x.isfinite().all() for x in results)


# ---- how it is called ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_views(op: str) -> None:
    layout = make_layout(lengths_of("typical"))
    tensors = inputs(op, layout, SHAPES[1])
    grad = torch.randn_like(tensors[0])
    expected = with_gradients(ours(op), tensors, layout, grad)
    views = [awkward_view(x).requires_grad_() for x in tensors]
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors]
    scattered = PatchLayout(*(awkward_view(getattr(layout, n)) for n in PatchLayout.__dataclass_fields__))
    for leaves in (views, transposed):
        out = ours(op)(*leaves, scattered)
        gradients = torch.autograd.grad(out, leaves, awkward_view(grad))
        for a, b in zip((out, *gradients), expected, strict=True):
            assert torch.equal(a, b)
    # The gradient of a sum is one element, expanded.
    (a,) = torch.autograd.grad(ours(op)(*views, layout).sum(), views[:1])
    assert torch.equal(a, with_gradients(ours(op), tensors, layout, torch.ones_like(grad))[1])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch, num_bytes, capacity", [(0, 4, 2), (2, 0, 3), (2, 0, 0)])
def test_empty_tensors(batch: int, num_bytes: int, capacity: int, op: str) -> None:
    layout = PatchLayout.from_lengths(torch.zeros(batch, capacity, dtype=torch.long), num_bytes)
    tensors = inputs(op, layout, SHAPES[0])
    out, *gradients = with_gradients(ours(op), tensors, layout, torch.ones_like(tensors[0]))
    for a, b in zip((out, *gradients), (tensors[0], *tensors), strict=True):
        assert a.shape == b.shape and not a.any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 2])
def test_same_for_any_number_of_threads(window: int, op: str) -> None:
    for lengths in (random_lengths(1500, 4.5, batch=2), torch.tensor([[2000, 1, 3]])):
        layout = make_layout(lengths)
        tensors = inputs(op, layout, (2, 4, 2, 20, window))
        grad = torch.randn_like(tensors[0])
        assert_same_for_any_threads(
            lambda t=tensors, y=layout, g=grad: with_gradients(ours(op), t, y, g, window=window)
        )


@pytest.mark.parametrize("capability", CPU_CAPABILITIES)
def test_every_instruction_set(capability: str) -> None:
    run_with_capability("import test_cross_attention; test_cross_attention.check_everything()", capability)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 2])
def test_opcheck(window: int, op: str) -> None:
    for layout, dtype, wanted in (
        (PACKED, torch.float64, (True, True, True)),
        (LEFT_PADDED, torch.bfloat16, (0, 1, 0)),
    ):
        q, k, v = inputs(op, layout, SHAPES[1], dtype)
        rest = (*layout_tensors(op, layout), None, window)
        lse = getattr(torch.ops.blt_kernels, f"{op}_cross_attention")(q, k, v, *rest)[1]
        opcheck(f"{op}_cross_attention_backward", (torch.randn_like(q), q, k, v, lse, *rest, *map(bool, wanted)))
        leaves = [x.requires_grad_(bool(w)) for x, w in zip((q, k, v), wanted, strict=True)]
        opcheck(f"{op}_cross_attention", (*leaves, *rest))


@pytest.mark.parametrize("op", OPS)
def test_compiles_once_for_all_raggedness(op: str) -> None:
    fn = torch.compile(lambda q, k, v, layout: ours(op)(q, k, v, layout, window=2).sin(), fullgraph=True)
    with assert_no_recompile():
        for row in ([3, 1, 4, 4], [1, 1, 1, 9], [0, 12, 0, 0], [2, 2, 2, 2]):
            layout = make_layout(torch.tensor([row]), 12)
            tensors = inputs(op, layout, SHAPES[1])
            grad = torch.randn_like(tensors[0])
            actual = with_gradients(fn, tensors, layout, grad)
            expected = with_gradients(lambda *x: ours(op)(*x, window=2).sin(), tensors, layout, grad)
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_compiles_with_dynamic_sizes(op: str) -> None:
    fn = torch.compile(lambda q, k, v, layout: ours(op)(q, k, v, layout), fullgraph=True, dynamic=True)
    with assert_no_recompile():
        # No two sizes of a call are equal: torch.compile would take that for a rule.
        for lengths in ([3, 1, 4, 4, 1], [1, 1, 1, 9, 2, 3], [5, 12, 1, 1, 1, 1, 2, 3, 1]):
            layout = make_layout(torch.tensor([lengths, lengths, lengths]))
            tensors = inputs(op, layout, (2, 16, 8, 5, 1))
            torch.testing.assert_close(fn(*tensors, layout), ours(op)(*tensors, layout))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, op: str) -> None:
    layout = make_layout(lengths_of("typical"))
    q, k, v = inputs(op, layout, SHAPES[0])
    leaves = [q.requires_grad_(), k.requires_grad_(), v.to(dtype).requires_grad_()]
    with torch.autocast("cpu", dtype):
        out = ours(op)(*leaves, layout)
        double = ours(op)(*(x.double() for x in leaves), layout)
    assert out.dtype == dtype and double.dtype == torch.float64
    assert torch.equal(out, ours(op)(*(x.to(dtype) for x in leaves), layout))
    out.sum().backward()
    assert [x.grad.dtype for x in leaves] == [torch.float32, torch.float32, dtype]


@pytest.mark.parametrize("op", OPS)
def test_modes_and_backends(op: str) -> None:
    layout = make_layout(lengths_of("typical"))
    tensors = inputs(op, layout, SHAPES[0])
    expected = ours(op)(*tensors, layout)
    with torch.inference_mode():
        assert torch.equal(ours(op)(*tensors, layout), expected)
    with use_backend("reference"):
        torch.testing.assert_close(ours(op)(*tensors, layout), expected)
    meta = ours(op)(*(x.to("meta") for x in tensors), layout.to("meta"))
    assert meta.shape == expected.shape and meta.dtype == expected.dtype


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": 1.0}, TypeError, "q: expected a torch.Tensor, got float"),
        ({"k": torch.zeros(2, 3)}, ValueError, r"k: expected 4 dimensions, got shape \(2, 3\)"),
        ({"q": torch.zeros(1, 1, 1, 1, dtype=torch.int64)}, TypeError, "q: expected dtype float32 or .*, got int64"),
        ({"v": lambda v: v.double()}, TypeError, r"v: expected dtype float32 \(as q\), got float64"),
        ({"k": lambda k: k.to("meta")}, ValueError, r"k: expected device cpu \(where q is\), got device meta"),
        ({"layout": None}, TypeError, "layout: expected a PatchLayout, got NoneType"),
        ({"layout": lambda y: y.to("meta")}, ValueError, r"layout.offsets: expected device cpu \(where q is\)"),
        ({"scale": "1"}, TypeError, "scale: expected a float, got str"),
        ({"scale": math.nan}, ValueError, "scale: expected a number, got nan"),
        ({"window": 1.5}, TypeError, "window: expected an int, got float"),
        ({"window": True}, TypeError, "window: expected an int, got bool"),
        ({"window": 0}, ValueError, "window: expected 1 .. 9223372036854775807, got 0"),
        ({"window": 2**63}, ValueError, "window: expected 1 .. 9223372036854775807, got 9223372036854775808"),
        ({"q": lambda q: q[:1]}, ValueError, r"q: expected shape \(2, "),
        ({"q": lambda q: q[..., :0], "k": lambda k: k[..., :0]}, ValueError, "q: expected head dimension E >= 1"),
        ({"k": lambda k: k[..., :5]}, ValueError, r"k: expected shape \(\*, \*, \*, 7\)"),
        ({"v": lambda v: v[:, :, :1]}, ValueError, r"v: expected shape \(2, "),
        ({"q": lambda q: q[:, :, :3]}, ValueError, "q: expected a positive multiple of the 2 heads of k, got 3 heads"),
        ({"q": lambda q: q[:, :, :0]}, ValueError, "q: expected a positive multiple of the 2 heads of k, got 0 heads"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str, op: str) -> None:
    layout = make_layout(lengths_of("typical"))
    arguments = dict(zip("qkv", inputs(op, layout, (2, 4, 2, 7, 1)), strict=True), layout=layout)
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    with pytest.raises(error, match=f"^{op}_cross_attention: {message}"):
        ours(op)(**arguments)


@pytest.mark.parametrize("op", OPS)
def test_errors_of_row_counts(op: str) -> None:
    layout = make_layout(lengths_of("typical"))
    q, k, v = inputs(op, layout, (2, 4, 2, 7, 1))
    slots, slot_rows = ("q", q) if op == "encoder" else ("k", k)
    for rows in (slot_rows.shape[1] - 1, layout.capacity - 1, 0):
        arguments = (q[:, :rows], k, v) if op == "encoder" else (q, k[:, :rows], v[:, :rows])
        expected = rf"{slots}: expected C\*K rows, C = 6 slots of the layout and K >= 1, got {rows} rows"
        with pytest.raises(ValueError, match=f"^{op}_cross_attention: {expected}"):
            ours(op)(*arguments, layout)
    arguments = (q, k[:, 1:], v[:, 1:]) if op == "encoder" else (q[:, 1:], k, v)
    with pytest.raises(ValueError, match=r": expected shape \(2, 23, \*, \*\)"):
        ours(op)(*arguments, layout)


@pytest.mark.parametrize(
    "op, name, values, message",
    [
        (
            "encoder",
            "offsets",
            [[0, 3, 2, 5]],
            r"offsets: expected non-decreasing values .* to 5, got 2 at \[0, 2\]",
        ),
        ("encoder", "offsets", [[-1, 3, 4, 5]], r"offsets: expected .*, got -1 at \[0, 0\]"),
        ("encoder", "offsets", [[0, 3, 4, 6]], r"offsets: expected .*, got 6 at \[0, 3\]"),
        ("decoder", "visible_ids", [[-1, 0, 3, 3, 3]], "visible_ids: expected ids below 3, .*, got 3"),
        ("decoder", "visible_ids", [[-2, 0, 0, 1, 1]], "visible_ids: expected ids below 3, .*, got -2"),
        ("decoder", "visible_ids", [[0, 1, 0, 1, 1]], r"visible_ids: expected ids .*, got 0 at \[0, 2\] after 1"),
        ("decoder", "visible_ids", [[0, -1, 0, 1, 1]], r"visible_ids: expected ids .*, got 0 at \[0, 2\] after 0"),
        ("encoder", "cu_patches", [1, 3], "cu_patches: expected non-decreasing values from 0 .*, got 1 at index 0"),
        ("decoder", "cu_patches", [0, 2, 1], "cu_patches: expected .* to at most 3, got 1 at index 2"),
        ("decoder", "cu_patches", [0, 4], "cu_patches: expected .* to at most 3, got 4 at index 1"),
    ],
)
def test_values_of_the_layout_that_make_no_sense(op: str, name: str, values: list, message: str) -> None:
    good = make_layout(torch.tensor([[1, 2, 2]]))
    fields = {n: getattr(good, n) for n in PatchLayout.__dataclass_fields__}
    layout = PatchLayout(**{**fields, name: torch.tensor(values, dtype=torch.int32)})
    tensors = inputs(op, layout, SHAPES[0])
    with pytest.raises(RuntimeError, match=f"{op}_cross_attention: {message}"):
        ours(op)(*tensors, layout)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "index, change, message",
    [
        (0, lambda q: q[0], "q: expected 4 dimensions, got 3"),
        (0, lambda q: q.int(), "q: expected dtype float32, float64, bfloat16 or float16"),
        (0, lambda q: q[:, :, :3], "q: expected a positive multiple of the 2 heads of k, got 3"),
        (0, lambda q: q[..., :0], "k: expected size 0 in dimension 3, got 7"),
        (1, lambda k: k.double(), "k: expected the dtype of q"),
        (2, lambda v: v[:, 1:], "v: expected size"),
        (-1, lambda window: 0, "window: expected at least 1, got 0"),
        (-3, lambda cu: cu.long(), "cu_patches: expected dtype int32"),
        (-3, lambda cu: cu[:2], "cu_patches: expected size 3, got 2"),
        (-4, lambda offsets: offsets[:, :0], "offsets: expected shape"),
    ],
)
def test_direct_calls_are_checked_too(index: int, change, message: str, op: str) -> None:
    layout = make_layout(lengths_of("typical"))
    arguments = [*inputs(op, layout, (2, 4, 2, 7, 1)), *layout_tensors(op, layout), None, 1]
    arguments[index] = change(arguments[index])
    with pytest.raises(RuntimeError, match=f"{op}_cross_attention: {message}"):
        getattr(torch.ops.blt_kernels, f"{op}_cross_attention")(*arguments)
