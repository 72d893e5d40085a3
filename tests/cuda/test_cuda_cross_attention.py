import math

import pytest
import torch
from helpers import FLOAT_DTYPES, assert_as_accurate, awkward_view, lengths_of, make_layout
from ptx import any_result

from blt_kernels import PatchLayout, reference

OPS = ("encoder", "decoder")
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
LONG = make_layout(torch.tensor([[3, 200, 0, 1, 300, 2], [128, 129, 2, 3, 4, 5]]), 520)
NAMES = ("one_byte", "typical", "inner_empty", "leading_empty", "unequal_rows", "all_empty")
LAYOUTS = [
    *(make_layout(lengths_of(name), int(lengths_of(name).sum(1).max()) + 2) for name in NAMES),
    PACKED,
    LEFT_PADDED,
]


def inputs(op, layout, shape, dtype=torch.float32):
    """q, k, v and the gradient of the result."""
    slots, heads, key_heads, width = shape
    batch, rows = layout.offsets.shape[0], (layout.capacity * slots, layout.num_bytes)
    q_rows, kv_rows = rows if op == "encoder" else rows[::-1]
    sizes = ((q_rows, heads), (kv_rows, key_heads), (kv_rows, key_heads), (q_rows, heads))
    return [torch.randn(batch, n, h, width).to(dtype) for n, h in sizes]


def layout_tensors(op, layout):
    shared = [layout.offsets, layout.cu_patches]
    return shared if op == "encoder" else [layout.visible_ids, *shared]


def run(cuda_ops, op, tensors, layout, window=1, scale=None, needed=(True, True, True)):
    """out, the gradients of q, k and v, and lse, by the CUDA kernels."""
    q, k, v, grad = tensors
    rest = layout if isinstance(layout, list) else layout_tensors(op, layout)
    out, lse = getattr(cuda_ops, f"{op}_cross_attention")(q, k, v, *rest, scale, window)
    backward = getattr(cuda_ops, f"{op}_cross_attention_backward")
    return [out, *backward(grad, q, k, v, lse, *rest, scale, window, *needed), lse]


def run_reference(op, tensors, layout, dtype, window=1, scale=None):
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors[:3]]
    out = getattr(reference, f"{op}_cross_attention")(*leaves, layout, window=window, scale=scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(dtype))]


def check(cuda_ops, op, layouts, shape, dtype, window):
    """Takes the maximum error over all layouts, because that of a few elements would say little."""
    results = []
    for layout in layouts:
        tensors = inputs(op, layout, shape, dtype)
        eager = run_reference(op, tensors, layout, dtype, window)
        exact = run_reference(op, tensors, layout, torch.float64, window)
        results.append(
            [
                [x.flatten() for x in three]
                for three in zip(run(cuda_ops, op, tensors, layout, window), eager, exact, strict=False)
            ]
        )
    for i, name in enumerate(("out", "grad_q", "grad_k", "grad_v")):
        actual, eager, exact = (torch.cat([result[i][which] for result in results]) for which in range(3))
        if dtype == torch.float32 and shape[3] < 64:  # which of two maxima is larger is chance here
            torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=1e-5 if layouts[0] is LONG else 4e-6)
        else:
            assert_as_accurate(actual, eager, exact, name)


# K, H, Hkv, E
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("window", "dtype"),
    [*((1, dtype) for dtype in FLOAT_DTYPES), (2, torch.float32), (5, torch.float64), (2, torch.bfloat16)],
)
@pytest.mark.parametrize("shape", [(2, 1, 1, 64), (1, 4, 2, 5), (2, 6, 2, 8)], ids=str)
def test_layouts(cuda_ops, shape, dtype, window, op):
    torch.manual_seed(0)
    check(cuda_ops, op, LAYOUTS, shape, dtype, window)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 1, 64),
        (4, 1, 1, 64),
        (5, 2, 2, 16),
        (5, 2, 1, 64),
        (1, 12, 12, 64),
        (1, 2, 2, 16),
        (4, 2, 2, 16),
        (2, 1, 1, 300),
        (2, 1, 1, 66),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes(cuda_ops, dtype, shape, op):
    torch.manual_seed(0)
    check(cuda_ops, op, LAYOUTS[1:4], shape, dtype, 1)
    if shape[3] == 300:
        check(cuda_ops, op, LAYOUTS[2:3], shape, torch.float32, 3)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("shape", [(2, 1, 1, 64), (1, 2, 1, 5), (3, 2, 1, 16)], ids=str)
def test_long_patches(cuda_ops, shape, window, op):
    torch.manual_seed(0)
    check(cuda_ops, op, [LONG], shape, torch.float32 if shape[3] < 64 else torch.bfloat16, window)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(2, 2, 1, 16), (1, 2, 1, 5)], ids=str)
def test_long_patches_of_every_dtype(cuda_ops, shape, dtype, window, op):
    torch.manual_seed(0)
    check(cuda_ops, op, [LONG], shape, dtype, window)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 3])
def test_log_sum_exp_and_scale(cuda_ops, window, op):
    for layout in (PACKED, LEFT_PADDED, LONG):
        tensors = inputs(op, layout, (2, 4, 2, 5), torch.float64)
        for scale in (None, 0.0, -0.7):
            actual = run(cuda_ops, op, tensors, layout, window, scale)
            torch.testing.assert_close(actual[:4], run_reference(op, tensors, layout, torch.float64, window, scale))
            rest = layout_tensors(op, layout)
            lse = getattr(torch.ops.blt_kernels, f"{op}_cross_attention")(*tensors[:3], *rest, scale, window)[1]
            torch.testing.assert_close(actual[4], lse)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 2])
def test_gradients_of_some_inputs_and_views(cuda_ops, window, op):
    layout = make_layout(lengths_of("inner_empty"), 9)
    tensors = inputs(op, layout, (2, 4, 2, 16))
    expected = run(cuda_ops, op, tensors, layout, window)
    for needed in ((True, False, False), (False, True, False), (False, False, True)):
        for gradient, whole, need in zip(
            run(cuda_ops, op, tensors, layout, window, None, needed)[1:4], expected[1:4], needed, strict=True
        ):
            assert torch.equal(gradient, whole) if need else gradient.numel() == 0
    views = [awkward_view(x) for x in tensors]
    shifted = [torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x) for x in tensors]  # addresses that are not aligned
    scattered = [awkward_view(x) for x in layout_tensors(op, layout)]
    for a, b, c in zip(
        expected, run(cuda_ops, op, views, scattered, window), run(cuda_ops, op, shifted, layout, window), strict=True
    ):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("slots", "window", "special"), [(1, 1, math.nan), (5, 1, math.inf), (1, 2, math.inf), (2, 2, math.nan)]
)
def test_special_values_are_those_of_a_softmax(cuda_ops, slots, window, special, op):
    clean = inputs(op, PACKED, (slots, 1, 1, 8))
    for argument in range(3):
        for row in range(0, clean[argument].shape[1], slots):
            tensors = [x.clone() for x in clean]
            tensors[argument][0, row] = special
            actual = run(cuda_ops, op, tensors, PACKED, window)
            rest = layout_tensors(op, PACKED)
            q, k, v, grad = tensors
            out, lse = getattr(torch.ops.blt_kernels, f"{op}_cross_attention")(q, k, v, *rest, None, window)
            backward = getattr(torch.ops.blt_kernels, f"{op}_cross_attention_backward")
            expected = [out, *backward(grad, q, k, v, lse, *rest, None, window, True, True, True), lse]
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_bytes", [3, 300])
def test_infinite_scores_as_in_softmax(cuda_ops, num_bytes):
    inf, nan = math.inf, math.nan
    layout = make_layout(torch.tensor([[num_bytes]]))
    v = torch.arange(num_bytes).float().view(1, num_bytes, 1, 1)
    for first in ([0.0, -inf, 0.0], [-inf, -inf, -inf], [0.0, inf, 0.0], [0.0, nan, 0.0], [3e38, -3e38, 3e38]):
        for others in (-inf, 0.0):
            scores = torch.tensor(first + [others] * (num_bytes - 3))
            out = run(
                cuda_ops,
                "encoder",
                [torch.ones(1, 1, 1, 1), scores.view(1, -1, 1, 1), v, torch.ones(1, 1, 1, 1)],
                layout,
            )[0]
            torch.testing.assert_close(out.flatten()[0], scores.softmax(0) @ v.flatten(), equal_nan=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("num_bytes", [12, 300])
def test_bad_values_stay_within_the_tensors(cuda_ops, num_bytes, window, op):
    generator = torch.Generator().manual_seed(0)
    layout = PatchLayout.from_lengths(torch.ones(1, 6, dtype=torch.long), num_bytes)
    tensors = inputs(op, layout, (2, 2, 1, 8))
    for _ in range(4):
        rest = [torch.randint(-400, 400, x.shape, generator=generator).int() for x in layout_tensors(op, layout)]
        with any_result():
            results = run(cuda_ops, op, tensors, rest, window)
        for actual, like in zip(results, [tensors[0], *tensors[:3]], strict=False):
            assert actual.shape == like.shape


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("batch", "num_bytes", "capacity"), [(0, 4, 2), (2, 0, 3), (2, 0, 0), (2, 4, 0)])
def test_no_elements(cuda_ops, batch, num_bytes, capacity, op):
    layout = PatchLayout.from_lengths(torch.zeros(batch, capacity, dtype=torch.long), num_bytes)
    tensors = inputs(op, layout, (2, 2, 2, 8))
    for window in (1, 2):
        for actual, like in zip(
            run(cuda_ops, op, tensors, layout, window)[:4], [tensors[0], *tensors[:3]], strict=True
        ):
            assert actual.shape == like.shape and not actual.any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [1, 2])
def test_every_output_element_is_written(cuda_ops, window, op, poisoned_memory):
    names = ("inner_empty", "leading_empty", "empty_row", "all_empty")
    layouts = [make_layout(lengths_of(name), 150) for name in names]
    for layout in (PACKED, LEFT_PADDED, *layouts):
        for shape in ((2, 2, 1, 8), (1, 1, 1, 5)):
            results = run(cuda_ops, op, inputs(op, layout, shape), layout, window)
            assert all(x.isfinite().all() for x in results[:4]) and not results[4].isnan().any()
