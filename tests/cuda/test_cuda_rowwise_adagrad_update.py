"""rowwise_adagrad_update by the CUDA kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FLOAT_DTYPES, assert_as_accurate, awkward_view

from blt_kernels import reference

NUMBERS = (0.1, 1e-8, 0.3)  # lr, eps, weight_decay


def case(width: int, dtype: torch.dtype, count: int = 21) -> tuple[torch.Tensor, ...]:
    state = torch.rand(50, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rows = torch.randperm(50)[:count].sort().values
    return torch.randn(50, width).to(dtype), state, rows, torch.randn(count, width).to(dtype)


def by_reference(arguments: tuple[torch.Tensor, ...], dtype: torch.dtype | None, scale: torch.Tensor | None) -> Any:
    table, state, rows, values = arguments
    table, state, values = (x.clone() if dtype is None else x.to(dtype, copy=True) for x in (table, state, values))
    lr, eps, weight_decay = NUMBERS
    reference.rowwise_adagrad_update(table, state, rows, values, lr=lr, eps=eps, weight_decay=weight_decay, scale=scale)
    return table, state


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [1, 6, 64, 200, 1030])
@pytest.mark.parametrize("scaled", [False, True])
def test_as_accurate_as_eager(cuda_ops: Any, dtype: torch.dtype, width: int, scaled: bool) -> None:
    torch.manual_seed(0)
    table, state, rows, values = arguments = case(width, dtype)
    scale = torch.tensor(0.7, dtype=state.dtype) if scaled else None
    eager = by_reference(arguments, None, scale)
    exact = by_reference(arguments, torch.float64, None if scale is None else scale.double())
    cuda_ops.rowwise_adagrad_update(table, state, rows, awkward_view(values), scale, *NUMBERS)
    for a, b, c, name in zip((table, state), eager, exact, ("table", "state"), strict=True):
        assert_as_accurate(a, b, c, f"{name}, {dtype}, width {width}")


def test_rows_out_of_range_are_left_out(cuda_ops: Any) -> None:
    torch.manual_seed(0)
    table, state, _, values = case(16, torch.float32, 4)
    before = table.clone(), state.clone()
    cuda_ops.rowwise_adagrad_update(table, state, torch.tensor([-1, 50, 2**40, -(2**40)]), values, None, *NUMBERS)
    assert torch.equal(table, before[0]) and torch.equal(state, before[1])


@pytest.mark.parametrize(("count", "width"), [(0, 8), (3, 0)])
def test_no_elements(cuda_ops: Any, count: int, width: int) -> None:
    table, state, rows, values = case(width, torch.float32, count)
    before = state.clone()
    cuda_ops.rowwise_adagrad_update(table, state, rows, values, None, *NUMBERS)
    assert torch.equal(state, before)
