"""The decoder's fast path: window 1, heads of 64 elements of 16 bits, as many key heads as heads, at most 4 slots."""

import math

import pytest
import torch
from helpers import awkward_view, lengths_of, make_layout
from ptx import any_result
from test_cuda_cross_attention import LAYOUTS, LONG, PACKED, check, inputs, layout_tensors, run

from blt_kernels import PatchLayout

WIDTH = 64
SLOTS = (1, 2, 3, 4)
HALVES = (torch.bfloat16, torch.float16)
# Rows of 77 bytes: the tiles of 8 bytes do not end where the rows end.
ODD_ROWS = make_layout(torch.tensor([[5, 1, 30, 0, 9], [1, 0, 0, 2, 1], [0, 70, 1, 1, 2]]), 77)


def by_cpu(tensors, layout, scale=None):
    """The same as `run`, by the CPU's op."""
    q, k, v, grad = tensors
    rest = layout_tensors("decoder", layout)
    out, lse = torch.ops.blt_kernels.decoder_cross_attention(q, k, v, *rest, scale, 1)
    backward = torch.ops.blt_kernels.decoder_cross_attention_backward
    return [out, *backward(grad, q, k, v, lse, *rest, scale, 1, True, True, True), lse]


# With 3 heads the lanes of a warp work on different tiles or patches.
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("slots", SLOTS)
def test_layouts(cuda_ops, slots, heads, dtype):
    torch.manual_seed(0)
    check(cuda_ops, "decoder", [*LAYOUTS, ODD_ROWS], (slots, heads, heads, WIDTH), dtype, 1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("slots", SLOTS)
def test_long_patches(cuda_ops, slots, dtype):
    torch.manual_seed(0)
    check(cuda_ops, "decoder", [LONG], (slots, 3, 3, WIDTH), dtype, 1)


@pytest.mark.parametrize("scale", [None, 0.0, -0.7])
@pytest.mark.parametrize("slots", SLOTS)
def test_log_sum_exp_and_scale(cuda_ops, slots, scale):
    torch.manual_seed(0)
    for layout in (PACKED, ODD_ROWS, LONG):
        tensors = inputs("decoder", layout, (slots, 2, 2, WIDTH), torch.bfloat16)
        actual, expected = run(cuda_ops, "decoder", tensors, layout, 1, scale), by_cpu(tensors, layout, scale)
        torch.testing.assert_close(actual[4], expected[4], rtol=1e-6, atol=4e-6)
        for a, b in zip(actual[:4], expected[:4], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("slots", [2, 4])
def test_gradients_of_some_inputs_and_views(cuda_ops, slots):
    torch.manual_seed(0)
    layout = make_layout(torch.tensor([[5, 130, 0, 9], [1, 0, 2, 1]]), 150)
    tensors = inputs("decoder", layout, (slots, 3, 3, WIDTH), torch.bfloat16)
    expected = run(cuda_ops, "decoder", tensors, layout)
    for needed in ((True, False, False), (False, True, False), (False, False, True)):
        gradients = run(cuda_ops, "decoder", tensors, layout, 1, None, needed)[1:4]
        for gradient, whole, need in zip(gradients, expected[1:4], needed, strict=True):
            assert torch.equal(gradient, whole) if need else gradient.numel() == 0
    views = [awkward_view(x) for x in tensors]
    scattered = [awkward_view(x) for x in layout_tensors("decoder", layout)]
    # Addresses that are not aligned take another path.
    shifted = [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x) for x in tensors]
    for whole, viewed, other in zip(
        expected,
        run(cuda_ops, "decoder", views, scattered),
        run(cuda_ops, "decoder", shifted, layout),
        strict=True,
    ):
        assert torch.equal(whole, viewed)
        torch.testing.assert_close(whole, other, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("slots", SLOTS)
def test_special_values_are_those_of_a_softmax(cuda_ops, slots, special):
    torch.manual_seed(0)
    clean = inputs("decoder", PACKED, (slots, 2, 2, WIDTH), torch.bfloat16)
    for argument in range(4):
        for row in range(0, clean[argument].shape[1], 3):
            tensors = [x.clone() for x in clean]
            tensors[argument][0, row, 1, 20] = special
            for a, b in zip(run(cuda_ops, "decoder", tensors, PACKED), by_cpu(tensors, PACKED), strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("first", [0.0, -math.inf, math.inf, math.nan, 3e38])
@pytest.mark.parametrize("others", [0.0, -math.inf, -3e38])
@pytest.mark.parametrize("slots", SLOTS)
def test_infinite_scores_as_in_softmax(cuda_ops, slots, others, first):
    layout = PatchLayout.from_lengths(torch.tensor([[1, 4]]))
    q, k, v, grad = inputs("decoder", layout, (slots, 1, 1, WIDTH), torch.bfloat16)
    q.zero_()[..., 0] = 1
    k.zero_()[..., 0] = others
    k[:, ::slots, :, 0] = first
    out, lse = (run(cuda_ops, "decoder", [q, k, v, grad], layout, 1, 1.0)[i] for i in (0, 4))
    scores = k[0, :slots, 0, 0].float()
    seeing = layout.visible_ids[0] == 0
    assert seeing.any()
    expected = (scores.softmax(0) @ v[0, :slots, 0].float()).bfloat16().expand(int(seeing.sum()), -1)
    torch.testing.assert_close(out[0, seeing, 0], expected, equal_nan=True, rtol=1e-2, atol=1e-3)
    expected_lse = scores.logsumexp(0) if scores.softmax(0).isfinite().all() else torch.tensor(math.nan)
    torch.testing.assert_close(lse[0, seeing, 0], expected_lse.expand(int(seeing.sum())), equal_nan=True)


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("num_bytes", [12, 300])
def test_bad_values_stay_within_the_tensors(cuda_ops, num_bytes, slots):
    generator = torch.Generator().manual_seed(0)
    layout = PatchLayout.from_lengths(torch.ones(2, 6, dtype=torch.long), num_bytes)
    tensors = inputs("decoder", layout, (slots, 2, 2, WIDTH), torch.bfloat16)
    for _ in range(4):
        rest = [torch.randint(-400, 400, x.shape, generator=generator).int() for x in layout_tensors("decoder", layout)]
        with any_result():
            results = run(cuda_ops, "decoder", tensors, rest)
        for actual, like in zip(results, [tensors[0], *tensors[:3]], strict=False):
            assert actual.shape == like.shape


@pytest.mark.parametrize(("batch", "num_bytes", "capacity"), [(0, 4, 2), (2, 0, 3), (2, 0, 0), (2, 4, 0), (1, 200, 0)])
def test_no_elements(cuda_ops, batch, num_bytes, capacity):
    layout = PatchLayout.from_lengths(torch.zeros(batch, capacity, dtype=torch.long), num_bytes)
    tensors = inputs("decoder", layout, (2, 2, 2, WIDTH), torch.bfloat16)
    for actual, like in zip(run(cuda_ops, "decoder", tensors, layout)[:4], [tensors[0], *tensors[:3]], strict=True):
        assert actual.shape == like.shape and not actual.any()


@pytest.mark.parametrize("slots", [2, 4])
def test_every_output_element_is_written(cuda_ops, slots, poisoned_memory):
    names = ("inner_empty", "leading_empty", "empty_row", "all_empty")
    layouts = [make_layout(lengths_of(name), 150) for name in names]
    for layout in (PACKED, ODD_ROWS, LONG, *layouts):
        results = run(cuda_ops, "decoder", inputs("decoder", layout, (slots, 2, 2, WIDTH), torch.bfloat16), layout)
        assert all(x.isfinite().all() for x in results[:4]) and not results[4].isnan().any()
