"""patch_gather: rows of the right patch for every byte, and their gradients summed over the bytes that read them."""

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

from blt_kernels import PatchLayout, patch_gather, patch_pool, reference, use_backend

WHICH = ("visible", "own")
WIDTHS = (1, 3, 16, 33, 64, 200, 1030)
SMALL = make_layout(torch.tensor([[1, 5, 0, 2]]), 9)


def ids_of(layout: PatchLayout, which: str) -> torch.Tensor:
    return layout.visible_ids if which == "visible" else layout.patch_ids


def loop(y: torch.Tensor, layout: PatchLayout, which: str) -> torch.Tensor:
    """patch_gather by a loop over bytes."""
    zero = y.new_zeros(y.shape[2])
    rows = [
        torch.stack([row[i] if i >= 0 else zero for i in ids]) if ids else row[:0]
        for row, ids in zip(y, ids_of(layout, which).tolist(), strict=True)
    ]
    return torch.stack(rows)


def eager(y: torch.Tensor, layout: PatchLayout, which: str) -> torch.Tensor:
    """patch_gather as people write it in eager PyTorch, gradient summed in the dtype of y."""
    ids = ids_of(layout, which).long()[:, :, None].expand(-1, -1, y.shape[2])
    return torch.where(ids < 0, 0, y.gather(1, ids.clamp(min=0)))


def value_and_grad(fn, y: torch.Tensor, layout: PatchLayout, which: str, grad: torch.Tensor):
    y = y.detach().clone().requires_grad_()
    out = fn(y, layout, which)
    out.backward(grad.to(out.dtype))
    return out.detach(), y.grad


def random_y(layout: PatchLayout, width: int) -> torch.Tensor:
    return torch.randn(layout.offsets.shape[0], layout.capacity, width)


def check(layout: PatchLayout, width: int, dtype: torch.dtype, which: str) -> None:
    """Values exactly, gradients as accurately as eager sums them."""
    y = random_y(layout, width).to(dtype)
    grad = torch.randn(*layout.patch_ids.shape, width).to(dtype)
    out, grad_y = value_and_grad(patch_gather, y, layout, which, grad)
    exact = value_and_grad(reference.patch_gather, y.double(), layout, which, grad)
    assert torch.equal(out, exact[0].to(dtype))
    assert_as_accurate(grad_y, value_and_grad(eager, y, layout, which, grad)[1], exact[1], f"gradient, {which} {dtype}")


def check_everything() -> None:
    """What the tests of one processor's kernels run."""
    for width in WIDTHS:
        for dtype in FLOAT_DTYPES:
            for which in WHICH:
                check(SMALL, width, dtype, which)
    check_large(torch.float32)
    check_large(torch.bfloat16)


def check_large(dtype: torch.dtype) -> None:
    """Outputs of 32 MB and more are written by other instructions."""
    layout = make_layout(torch.tensor([[3, 0, 5], [1, 1, 0]]), 9)
    y = random_y(layout, 2**21 // dtype.itemsize).to(dtype)
    out = patch_gather(y, layout, "own")
    assert out.nbytes >= 32 * 2**20
    for row, y_row, ids in zip(out, y, layout.patch_ids, strict=True):
        for byte, i in zip(row, ids, strict=True):
            assert torch.equal(byte, y_row[i] if i >= 0 else torch.zeros_like(byte))


def test_golden_values() -> None:
    """The decoder ids of published BLT: lengths 1, 1, 3, 2, 1 over 7 of 8 bytes, the last patch unseen."""
    layout = PatchLayout.from_lengths(torch.tensor([[1, 1, 3, 2, 1]]), 7)
    y = torch.arange(10.0, 15).view(1, 5, 1)
    assert patch_gather(y, layout).flatten().tolist() == [10, 11, 11, 11, 12, 12, 13]
    assert patch_gather(y, layout, "own").flatten().tolist() == [10, 11, 12, 12, 12, 13, 13]
    _, grad = value_and_grad(patch_gather, y, layout, "visible", torch.ones(1, 7, 1))
    assert grad.flatten().tolist() == [1, 3, 2, 1, 0]


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", RAGGED)
def test_every_byte_gets_its_row(name: str, which: str) -> None:
    lengths = lengths_of(name)
    layout = make_layout(lengths, int(lengths.sum(1).max()) + 2)
    y = random_y(layout, 5)
    assert torch.equal(patch_gather(y, layout, which), loop(y, layout, which))
    for dtype in FLOAT_DTYPES:
        check(layout, 37, dtype, which)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, which: str, dtype: torch.dtype) -> None:
    check(SMALL, width, dtype, which)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", WHICH)
def test_one_patch_of_16k_bytes(which: str, dtype: torch.dtype) -> None:
    check(make_layout(torch.tensor(HUGE_PATCH)), 70, dtype, which)


@given(lengths=ragged_lengths(), width=st.integers(0, 70), padding=st.integers(0, 3), data=st.data())
def test_any_layout(lengths: torch.Tensor, width: int, padding: int, data: st.DataObject) -> None:
    which, dtype = data.draw(st.sampled_from(WHICH)), data.draw(st.sampled_from(FLOAT_DTYPES))
    check(make_layout(lengths, int(lengths.sum(1).max()) + padding), width, dtype, which)


@given(lengths=ragged_lengths())
def test_pooling_what_was_gathered_gives_it_back(lengths: torch.Tensor) -> None:
    layout = make_layout(lengths)
    y = random_y(layout, 9) * (lengths > 0)[:, :, None]
    for reduce in ("max", "min"):
        assert torch.equal(patch_pool(patch_gather(y, layout, "own"), layout, reduce), y)


@pytest.mark.parametrize("which", WHICH)
def test_packed_sequences_and_left_padding(which: str) -> None:
    """Bytes that see nothing lie between bytes that see something; the first patch may start late."""
    cu_seqlens = torch.tensor([0, 5, 5, 12])
    packed = PatchLayout.from_lengths(torch.tensor([[2, 3, 3, 0, 4]]), 14, cu_seqlens=cu_seqlens)
    assert (packed.visible_ids[0, 5:10] == -1).any()
    assert (packed.visible_ids[0, :5] >= 0).any()
    starts = torch.tensor([[False, False, True, False, True, True], [True, False, False, False, True, False]])
    padded = PatchLayout.from_starts(starts, capacity=4)
    for layout in (packed, padded):
        y = random_y(layout, 5)
        assert torch.equal(patch_gather(y, layout, which), loop(y, layout, which))
        check(layout, 24, torch.float32, which)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(
    "batch, num_bytes, capacity, width", [(0, 4, 2, 3), (2, 0, 3, 3), (2, 4, 0, 3), (2, 4, 2, 0), (1, 0, 0, 0)]
)
def test_empty_tensors(batch: int, num_bytes: int, capacity: int, width: int, which: str) -> None:
    lengths = torch.full((batch, capacity), min(num_bytes, 1))
    layout = PatchLayout.from_lengths(lengths, num_bytes, seq_lens=lengths.sum(1))
    y = torch.ones(batch, capacity, width, requires_grad=True)
    out = patch_gather(y, layout, which)
    assert out.shape == (batch, num_bytes, width)
    assert torch.equal(out, reference.patch_gather(y, layout, which))
    out.sum().backward()
    assert y.grad.shape == y.shape


@pytest.mark.parametrize("which", WHICH)
def test_nan_and_infinity_stay_with_their_readers(which: str) -> None:
    layout = make_layout(torch.tensor([[2, 3, 2, 1]]), 9)
    y = random_y(layout, 20)
    y[0, 1, 0], y[0, 1, 1], y[0, 1, 2] = math.nan, math.inf, -math.inf
    out = patch_gather(y, layout, which)
    reads = (ids_of(layout, which) == 1)[0]
    assert torch.equal(out[0, reads].isfinite().all(1), torch.zeros(int(reads.sum()), dtype=torch.bool))
    assert out[0, ~reads].isfinite().all()
    grad = torch.ones(1, 9, 20)
    grad[0, -1] = math.nan  # a byte in no patch
    grad[0, 2, 0] = math.inf
    _, grad_y = value_and_grad(patch_gather, y, layout, which, grad)
    assert grad_y.isinf().nonzero().tolist() == [[0, int(ids_of(layout, which)[0, 2]), 0]]
    assert not grad_y.isnan().any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("which", WHICH)
def test_every_output_is_written(poisoned_memory: None, which: str, dtype: torch.dtype) -> None:
    for name in RAGGED:
        layout = make_layout(lengths_of(name), int(lengths_of(name).sum(1).max()) + 3)
        out, grad = value_and_grad(
            patch_gather, random_y(layout, 21).to(dtype), layout, which, torch.ones(*layout.patch_ids.shape, 21)
        )
        assert out.isfinite().all()
        assert grad.isfinite().all()
        assert not out[ids_of(layout, which) < 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_too_large_for_caches(poisoned_memory: None, dtype: torch.dtype) -> None:
    check_large(dtype)


@pytest.mark.parametrize("which", WHICH)
def test_views(which: str) -> None:
    layout = make_layout(lengths_of("typical"))
    y, grad = random_y(layout, 40), torch.randn(2, 23, 40)
    expected = value_and_grad(patch_gather, y, layout, which, grad)
    strided = PatchLayout(**{name: awkward_view(value) for name, value in vars(layout).items()})
    view = awkward_view(y).requires_grad_()
    out = patch_gather(view, strided, which)
    assert torch.equal(out, expected[0])
    for g in (awkward_view(grad), grad.mT.contiguous().mT):
        assert torch.equal(torch.autograd.grad(out, view, g, retain_graph=True)[0], expected[1])


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(
    "lengths", [random_lengths(3000, 4.5, batch=3), torch.tensor(HUGE_PATCH)], ids=["mean", "huge"]
)
def test_threads_do_not_change_a_bit(lengths: torch.Tensor, which: str) -> None:
    layout = make_layout(lengths)
    y, grad = random_y(layout, 72), torch.randn(*layout.patch_ids.shape, 72)
    assert_same_for_any_threads(lambda: value_and_grad(patch_gather, y, layout, which, grad), counts=(1, 2, 3, 7))


@pytest.mark.parametrize("which", WHICH)
def test_reference_backend_agrees(which: str) -> None:
    layout = make_layout(lengths_of("unequal_rows"))
    y, grad = random_y(layout, 6), torch.randn(3, 14, 6)
    ours = value_and_grad(patch_gather, y, layout, which, grad)
    with use_backend("reference"):
        theirs = value_and_grad(patch_gather, y, layout, which, grad)
    definition = value_and_grad(reference.patch_gather, y, layout, which, grad)
    torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(theirs, definition, strict=True))


@pytest.mark.parametrize("which", WHICH)
def test_gradcheck(which: str) -> None:
    layout = make_layout(lengths_of("unequal_rows"), 16)
    y = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: patch_gather(y, layout, which), y)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda y: patch_gather(y, layout, which), y)


def test_second_derivative_is_refused() -> None:
    y = torch.randn(1, 2, 3, requires_grad=True)
    out = patch_gather(y, make_layout(torch.tensor([[2, 3]])))
    (grad,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="patch_gather has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", WHICH)
def test_opcheck(which: str, dtype: torch.dtype) -> None:
    layout = make_layout(lengths_of("unequal_rows"), 16)
    ids = ids_of(layout, which)
    opcheck("patch_gather", (random_y(layout, 8).to(dtype).requires_grad_(), ids))
    opcheck("patch_gather_backward", (torch.randn(3, 16, 8).to(dtype), ids, layout.capacity))


def test_compiles_once_for_every_raggedness() -> None:
    def step(y: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        return patch_gather(2 * y, layout).square() + patch_gather(y, layout, "own")

    compiled = torch.compile(step, fullgraph=True)
    with assert_no_recompile():
        for seed in range(5):
            lengths = torch.zeros(2, 30, dtype=torch.long)
            drawn = random_lengths(60, 5.0, batch=2, seed=seed)
            lengths[:, : drawn.shape[1]] = drawn
            layout = make_layout(lengths)
            y = torch.randn(2, 30, 16, requires_grad=True)
            out, expected = compiled(y, layout), step(y, layout)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(*(torch.autograd.grad(o.sum(), y)[0] for o in (out, expected)))


def test_compiles_once_for_every_size() -> None:
    compiled = torch.compile(patch_gather, fullgraph=True, dynamic=True, backend="aot_eager")
    with assert_no_recompile():
        for num_bytes in (20, 33, 47):
            layout = make_layout(random_lengths(num_bytes, 3.0, batch=2))
            y = random_y(layout, 8).requires_grad_()
            out = compiled(y, layout)
            assert torch.equal(out, patch_gather(y, layout))
            out.sum().backward()
            torch.testing.assert_close(y.grad.sum(), 8.0 * (layout.visible_ids >= 0).sum())


def test_inference_meta_and_autocast() -> None:
    layout = make_layout(lengths_of("typical"))
    y = random_y(layout, 8)
    with torch.inference_mode():
        assert torch.equal(patch_gather(y, layout), patch_gather(y.clone(), layout))
    meta = PatchLayout(**{name: value.to("meta") for name, value in vars(layout).items()})
    out = patch_gather(y.to("meta").requires_grad_(), meta)
    assert out.device.type == "meta"
    assert out.shape == (2, 23, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert patch_gather(y, layout).dtype == torch.float32
        assert patch_gather(y.bfloat16(), layout).dtype == torch.bfloat16


@pytest.mark.parametrize("capability", CPU_CAPABILITIES)
def test_every_processor(capability: str) -> None:
    run_with_capability("import test_patch_gather; test_patch_gather.check_everything()", capability)


LAYOUT = make_layout(torch.tensor([[2, 3], [1, 4]]))
Y = torch.zeros(2, 2, 4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((None, LAYOUT), TypeError, "patch_gather: y: expected a torch.Tensor, got NoneType"),
        ((Y.int(), LAYOUT), TypeError, "patch_gather: y: expected dtype float32 or .*, got int32"),
        ((Y.to_sparse(), LAYOUT), TypeError, r"patch_gather: y: expected a dense \(strided\) tensor"),
        ((Y[0], LAYOUT), ValueError, r"patch_gather: y: expected 3 dimensions, got shape \(2, 4\)"),
        ((Y[:, :1], LAYOUT), ValueError, r"patch_gather: y: expected shape \(2, 2, \*\), got shape \(2, 1, 4\)"),
        ((Y[:1], LAYOUT), ValueError, r"patch_gather: y: expected shape \(2, 2, \*\), got shape \(1, 2, 4\)"),
        ((Y, LAYOUT.offsets), TypeError, "patch_gather: layout: expected a PatchLayout, got Tensor"),
        (
            (Y.to("meta"), LAYOUT),
            ValueError,
            r"patch_gather: layout.offsets: expected device meta \(where y is\), got device cpu",
        ),
        ((Y, LAYOUT, "next"), ValueError, "patch_gather: which: expected one of 'visible', 'own', got 'next'"),
    ],
)
def test_wrong_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patch_gather(*arguments)


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


IDS = ids([0, 0, 1], [-1, 0, 0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((Y[0], IDS), "patch_gather: y: expected 3 dimensions, got 2"),
        ((Y.int(), IDS), "patch_gather: y: expected dtype float32"),
        ((Y, IDS[0]), "patch_gather: ids: expected 2 dimensions, got 1"),
        ((Y, IDS[:1]), "patch_gather: ids: expected size 2 in dimension 0, got 1"),
        ((Y, IDS.long()), "patch_gather: ids: expected dtype int32"),
        ((Y, ids([0, 2], [0, 0])), "patch_gather: ids: expected values from -1 to 1, got 2"),
        ((Y, ids([0, 1], [-2, 0])), "patch_gather: ids: expected values from -1 to 1, got -2"),
    ],
)
def test_backstop_of_the_raw_op(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.blt_kernels.patch_gather(*arguments)


GRAD = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((GRAD[0], IDS, 2), "patch_gather_backward: grad: expected 3 dimensions, got 2"),
        ((GRAD.int(), IDS, 2), "patch_gather_backward: grad: expected dtype float32"),
        ((GRAD, IDS[:, :2], 2), "patch_gather_backward: ids: expected size 3 in dimension 1, got 2"),
        ((GRAD, IDS, 1), "patch_gather_backward: ids: expected values from -1 to 0, got 1"),
        ((GRAD, IDS, -1), "patch_gather_backward: capacity: expected at least 0, got -1"),
        (
            (GRAD, ids([0, 1, 0], [0, 0, 0]), 2),
            "ids: expected the ids of a layout, which never decrease, got 0 after 1",
        ),
        ((GRAD, ids([0, -1, 0], [0, 0, 0]), 2), "ids: expected the ids of a layout, .* got 0 after 0"),
    ],
)
def test_backstop_of_the_raw_backward(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.blt_kernels.patch_gather_backward(*arguments)
