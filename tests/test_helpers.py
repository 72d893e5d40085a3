"""The test helpers themselves: a metric that cannot fail, or a poison that is not there, would pass anything."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CPU_CAPABILITIES,
    RAGGED,
    assert_as_accurate,
    assert_no_recompile,
    assert_same_for_any_threads,
    awkward_view,
    errors,
    lengths_of,
    make_layout,
    num_threads,
    ragged_lengths,
    random_lengths,
    run_with_capability,
    ulp,
)
from hypothesis import given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 1.5, 0.1, -3.7, 1024.0, 1e-3], dtype=dtype)
    step = torch.nextafter(x.abs(), torch.full_like(x, float("inf"))).double() - x.double().abs()
    torch.testing.assert_close(ulp(x.double(), dtype), step, rtol=0, atol=0)
    assert (
        ulp(torch.zeros(1, dtype=torch.float64), dtype).item()
        == torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )


def test_rounding_once_is_within_an_ulp() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = exact.to(dtype)
        assert errors(rounded, exact).largest_beyond_ulp == 0
        assert_as_accurate(rounded, rounded, exact)


@pytest.mark.parametrize(
    ("layer", "spoil"),
    [
        ("largest_beyond_ulp", lambda x: x.index_fill(0, torch.tensor([7]), 2.0)),  # one wrong element
        ("relative_l1", lambda x: x + 1e-4 * torch.randn_like(x)),  # noise everywhere
        ("relative_l2", lambda x: x + 1e-4 * torch.randn_like(x)),
        ("cosine", lambda x: x.roll(1)),  # right values, wrong places
        ("bias", lambda x: x * (1 + 1e-5)),  # a shift too small for any one element
    ],
)
def test_each_layer_sees_its_kind_of_error(layer: str, spoil) -> None:
    exact = torch.randn(4096, dtype=torch.float64)
    good = exact.float()
    before, after = errors(good, exact), errors(spoil(good), exact)
    assert getattr(after, layer) > 100 * max(getattr(before, layer), 1e-9)
    with pytest.raises(AssertionError, match="limit"):
        assert_as_accurate(spoil(good), good, exact)


def test_twice_the_eager_error_passes_and_four_times_does_not() -> None:
    exact = torch.randn(4096, dtype=torch.float64)
    noise = 1e-3 * torch.randn(4096)
    eager = exact.float() + noise
    assert_as_accurate(exact.float() + 1.9 * noise, eager, exact)
    with pytest.raises(AssertionError, match="limit"):
        assert_as_accurate(exact.float() + 4 * noise, eager, exact)


def test_nan_and_infinity_must_be_where_they_belong() -> None:
    exact = torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.float64)
    assert_as_accurate(exact.float(), exact.float(), exact)
    for wrong in (
        [1.0, 0.0, float("inf")],
        [1.0, float("nan"), -float("inf")],
        [float("nan"), float("nan"), float("inf")],
    ):
        with pytest.raises(AssertionError):
            assert_as_accurate(torch.tensor(wrong), exact.float(), exact)


@given(lengths=ragged_lengths())
def test_layouts_hold_the_lengths_they_were_drawn_with(lengths: torch.Tensor) -> None:
    layout = make_layout(lengths, int(lengths.sum(1).max()) + 2)
    assert layout.num_bytes == lengths.sum(1).max() + 2
    assert torch.equal(layout.offsets.diff(dim=1), lengths.int())
    for row, ids in zip(lengths, layout.patch_ids, strict=True):
        assert torch.equal(ids[ids >= 0], torch.arange(len(row)).repeat_interleave(row).int())
        assert (ids[row.sum() :] == -1).all()


def test_random_lengths_fill_their_rows() -> None:
    lengths = random_lengths(1000, mean=4.5, batch=3)
    assert lengths.sum(1).tolist() == [1000] * 3
    assert 3.5 < 1000 / (lengths > 0).sum(1).double().mean() < 5.5


@pytest.mark.parametrize("name", RAGGED)
def test_cases_are_rectangular(name: str) -> None:
    assert lengths_of(name).dim() == 2


def test_awkward_view_keeps_the_values() -> None:
    x = torch.randn(2, 3, 4)
    view = awkward_view(x)
    assert torch.equal(view, x)
    assert not view.is_contiguous()
    assert view.storage_offset() > 0


def test_poison_reaches_fresh_memory(poisoned_memory: None) -> None:
    assert torch.empty(1000).isnan().all()
    assert torch.empty(1000, dtype=torch.bfloat16).isnan().all()
    assert (torch.empty(1000, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


def test_thread_count_is_restored_and_its_effect_seen() -> None:
    before = torch.get_num_threads()
    with num_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(AssertionError):
        assert_same_for_any_threads(lambda: torch.tensor(float(torch.get_num_threads())))


def test_recompilation_is_seen() -> None:
    compiled = torch.compile(lambda x, flag: x + 1 if flag else x - 1, backend="eager")
    with assert_no_recompile():
        compiled(torch.ones(2), True)
        compiled(torch.zeros(2), True)
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(torch.ones(2), False)


@pytest.mark.parametrize("capability", CPU_CAPABILITIES)
def test_each_capability_runs_where_the_processor_has_it(capability: str) -> None:
    assert run_with_capability("print(torch.ops.blt_kernels.cpu_capability())", capability).strip() == capability
