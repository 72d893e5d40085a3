"""The fast path of encoder_cross_attention: window 1, heads of 64 elements of 16 bits, at most 4 slots."""

import math

import pytest
import torch
from helpers import awkward_view, make_layout
from ptx import any_result
from test_cuda_cross_attention import LAYOUTS, LEFT_PADDED, PACKED, check, inputs, layout_tensors, run

from blt_kernels import PatchLayout

DTYPES = (torch.bfloat16, torch.float16)
# Patches that begin and end at the borders of tiles of 128 bytes, and one that fills more tiles than the others.
BORDERS = make_layout(torch.tensor([[128, 128, 129, 1, 0], [1, 255, 2, 126, 3], [0, 386, 0, 0, 0]]), 389)
# Patches of more bytes than backward keeps dot products for, in a row of one tile and in rows of two.
MIDDLE = [make_layout(torch.tensor([lengths])) for lengths in ([33, 17, 65, 3], [34, 0, 70, 5, 31, 32])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_layouts(cuda_ops, slots, dtype):
    torch.manual_seed(0)
    check(cuda_ops, "encoder", LAYOUTS, (slots, 3, 3, 64), dtype, 1)


@pytest.mark.parametrize(
    ("slots", "dtype"), [(1, torch.float16), (2, torch.bfloat16), (3, torch.bfloat16), (4, torch.float16)], ids=str
)
def test_long_patches(cuda_ops, slots, dtype):
    torch.manual_seed(0)
    check(cuda_ops, "encoder", [BORDERS, *MIDDLE], (slots, 1, 1, 64), dtype, 1)


@pytest.mark.parametrize("slots", [2, 3])
def test_log_sum_exp_and_scale(cuda_ops, slots):
    for layout in (PACKED, LEFT_PADDED, BORDERS):
        tensors = inputs("encoder", layout, (slots, 2, 2, 64), torch.bfloat16)
        for scale in (None, 0.0, -0.7):
            lse = run(cuda_ops, "encoder", tensors, layout, 1, scale)[4]
            rest = layout_tensors("encoder", layout)
            expected = torch.ops.blt_kernels.encoder_cross_attention(*tensors[:3], *rest, scale, 1)[1]
            torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_some_inputs_and_views(cuda_ops, dtype):
    layout = BORDERS
    tensors = inputs("encoder", layout, (2, 2, 2, 64), dtype)
    expected = run(cuda_ops, "encoder", tensors, layout)
    for needed in ((True, False, False), (False, True, False), (False, False, True)):
        gradients = run(cuda_ops, "encoder", tensors, layout, 1, None, needed)[1:4]
        for gradient, whole, need in zip(gradients, expected[1:4], needed, strict=True):
            assert torch.equal(gradient, whole) if need else gradient.numel() == 0
    views = [awkward_view(x) for x in tensors]
    scattered = [awkward_view(x) for x in layout_tensors("encoder", layout)]
    for a, b in zip(expected, run(cuda_ops, "encoder", views, scattered), strict=True):
        assert torch.equal(a, b)


def test_unaligned_rows_take_the_other_path(cuda_ops):
    tensors = inputs("encoder", PACKED, (2, 2, 2, 64), torch.bfloat16)
    shifted = [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x) for x in tensors]
    for a, b in zip(run(cuda_ops, "encoder", tensors, PACKED), run(cuda_ops, "encoder", shifted, PACKED), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("slots", "special"), [(1, math.nan), (2, math.inf), (3, math.nan), (4, math.inf)])
def test_special_values_are_those_of_a_softmax(cuda_ops, slots, special):
    torch.manual_seed(0)
    clean = inputs("encoder", PACKED, (slots, 1, 1, 64), torch.bfloat16)
    rest = layout_tensors("encoder", PACKED)
    for argument in range(4):
        for row in (0, 5, clean[argument].shape[1] - 1):
            tensors = [x.clone() for x in clean]
            tensors[argument][0, row, 0, 3] = special
            q, k, v, grad = tensors
            actual = run(cuda_ops, "encoder", tensors, PACKED)
            out, lse = torch.ops.blt_kernels.encoder_cross_attention(q, k, v, *rest, None, 1)
            backward = torch.ops.blt_kernels.encoder_cross_attention_backward
            expected = [out, *backward(grad, q, k, v, lse, *rest, None, 1, True, True, True), lse]
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("num_bytes", [3, 300])
def test_infinite_scores_as_in_softmax(cuda_ops, num_bytes):
    inf, nan = math.inf, math.nan
    layout = make_layout(torch.tensor([[num_bytes]]))
    q, k, v = torch.zeros(1, 1, 1, 64), torch.zeros(1, num_bytes, 1, 64), torch.zeros(1, num_bytes, 1, 64)
    q[..., 0] = 1
    v[..., 1] = torch.linspace(-1, 1, num_bytes).view(1, -1, 1)
    for first in ([0.0, -inf, 0.0], [-inf, -inf, -inf], [0.0, inf, 0.0], [0.0, nan, 0.0], [3e38, -3e38, 3e38]):
        for others in (-inf, 0.0):
            scores = torch.tensor(first + [others] * (num_bytes - 3))
            k[..., 0] = scores.view(1, -1, 1)
            tensors = [x.bfloat16() for x in (q, k, v, torch.ones_like(q))]
            out = run(cuda_ops, "encoder", tensors, layout, 1, 1.0)[0]
            expected = scores.bfloat16().float().softmax(0) @ tensors[2][0, :, 0, 1].float()
            torch.testing.assert_close(out[0, 0, 0, 1].float(), expected, equal_nan=True, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("num_bytes", [12, 300])
def test_bad_values_stay_within_the_tensors(cuda_ops, num_bytes):
    generator = torch.Generator().manual_seed(0)
    layout = PatchLayout.from_lengths(torch.ones(2, 6, dtype=torch.long), num_bytes)
    tensors = inputs("encoder", layout, (3, 2, 2, 64), torch.bfloat16)
    for limit in (400, 400, 2**31 - 1):
        rest = [
            torch.randint(-limit, limit, x.shape, generator=generator).int() for x in layout_tensors("encoder", layout)
        ]
        with any_result():
            results = run(cuda_ops, "encoder", tensors, rest)
        for actual, like in zip(results, [tensors[0], *tensors[:3]], strict=False):
            assert actual.shape == like.shape


@pytest.mark.parametrize("slots", [1, 4])
def test_every_output_element_is_written(cuda_ops, slots, poisoned_memory):
    for layout in (PACKED, LEFT_PADDED, BORDERS):
        results = run(cuda_ops, "encoder", inputs("encoder", layout, (slots, 1, 1, 64), torch.bfloat16), layout)
        assert all(x.isfinite().all() for x in results[:4]) and not results[4].isnan().any()
