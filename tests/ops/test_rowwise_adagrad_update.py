"""rowwise_adagrad_update: the listed rows and nothing else, as accurately as eager PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    CPU_CAPABILITIES,
    FLOAT_DTYPES,
    assert_as_accurate,
    assert_same_for_any_threads,
    opcheck,
    run_with_capability,
)

from blt_kernels import reference, rowwise_adagrad_update, use_backend

WIDTHS = (1, 3, 16, 33, 64, 200, 512)
NUMBERS = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.3}


def case(width: int, dtype: torch.dtype, table_rows: int = 50, count: int = 20) -> tuple[torch.Tensor, ...]:
    """table, state, rows and values."""
    rows = torch.randperm(table_rows)[:count].sort().values
    state = torch.rand(table_rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return torch.randn(table_rows, width).to(dtype), state, rows, torch.randn(count, width).to(dtype)


def updated(fn, arguments: tuple[torch.Tensor, ...], dtype: torch.dtype | None = None, **options):
    """The table and state after an update of copies, in another dtype if one is given."""
    table, state, rows, values = arguments
    table, state, values = (x.clone() if dtype is None else x.to(dtype, copy=True) for x in (table, state, values))
    fn(table, state, rows, values, **NUMBERS, **options)
    return table, state


def check_everything() -> None:
    """What the tests of one processor's kernels run."""
    torch.manual_seed(0)
    for width in WIDTHS:
        for dtype in FLOAT_DTYPES:
            arguments = case(width, dtype)
            scale = torch.tensor(0.7, dtype=arguments[1].dtype)
            actual = updated(rowwise_adagrad_update, arguments, scale=scale)
            eager = updated(reference.rowwise_adagrad_update, arguments, scale=scale)
            exact = updated(reference.rowwise_adagrad_update, arguments, torch.float64, scale=scale.double())
            for a, b, c, name in zip(actual, eager, exact, ("table", "state"), strict=True):
                assert_as_accurate(a, b, c, f"{name}, {dtype}, width {width}")


def test_as_accurate_as_eager() -> None:
    check_everything()


@pytest.mark.parametrize("capability", CPU_CAPABILITIES)
def test_every_instruction_set(capability: str) -> None:
    run_with_capability("import test_rowwise_adagrad_update as t; t.check_everything()", capability)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_by_hand(backend: str) -> None:
    table, state = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([9.0, 3.5, 0.0])
    values = torch.tensor([[2.0, 6.0], [0.0, 0.0]])
    with use_backend(backend):
        rowwise_adagrad_update(
            table, state, torch.tensor([1, 2]), values, lr=0.5, eps=1e-30, weight_decay=0.2, scale=torch.tensor(0.5)
        )
    # g = (1, 3): the state becomes 3.5 + 5 = 8.5, and the row 0.9 * row - 0.5 / sqrt(8.5) * g.
    step = 0.5 / math.sqrt(8.5)
    torch.testing.assert_close(table[1], torch.tensor([2.7 - step, 3.6 - 3 * step]))
    assert table[0].tolist() == [1.0, 2.0] and state.tolist() == [9.0, 8.5, 0.0]
    # A gradient of zeros decays the row and leaves it finite.
    torch.testing.assert_close(table[2], torch.tensor([4.5, 5.4]))


def test_rows_that_are_not_listed_keep_their_bits() -> None:
    table, state, rows, values = case(33, torch.float32)
    others = torch.ones(50, dtype=torch.bool).index_fill(0, rows, False)
    new_table, new_state = updated(rowwise_adagrad_update, (table, state, rows, values))
    assert torch.equal(new_table[others], table[others]) and torch.equal(new_state[others], state[others])
    assert not torch.equal(new_table[rows], table[rows])


@pytest.mark.parametrize(("table_rows", "count", "width"), [(5, 0, 4), (0, 0, 4), (5, 5, 0), (1, 1, 1)])
def test_smallest_sizes(table_rows: int, count: int, width: int) -> None:
    arguments = case(width, torch.float32, table_rows, count)
    table, state = updated(rowwise_adagrad_update, arguments)
    assert table.isfinite().all()
    if width:
        expected = updated(reference.rowwise_adagrad_update, arguments)
        torch.testing.assert_close((table, state), expected)


def test_nan_stays_in_its_row() -> None:
    arguments = case(16, torch.float32)
    arguments[3][4, 2] = math.nan
    table, state = updated(rowwise_adagrad_update, arguments)
    spoilt = torch.zeros(50, dtype=torch.bool).index_fill(0, arguments[2][4:5], True)
    assert torch.equal(table.isnan().all(1), spoilt) and torch.equal(state.isnan(), spoilt)
    assert not table[~spoilt].isnan().any()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    arguments = case(512, torch.float32, 3000, 2000)
    assert_same_for_any_threads(lambda: updated(rowwise_adagrad_update, arguments))


def test_strided_gradients() -> None:
    table, state, rows, values = case(8, torch.float32)
    expected = updated(rowwise_adagrad_update, (table, state, rows, values))
    wide = torch.randn(20, 16)
    wide[:, ::2] = values
    spread = torch.zeros(40, dtype=torch.int64)
    spread[::2] = rows
    actual = updated(rowwise_adagrad_update, (table, state, spread[::2], wide[:, ::2]))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck(dtype: torch.dtype, scaled: bool) -> None:
    arguments = case(5, dtype)
    scale = torch.tensor(0.5, dtype=arguments[1].dtype) if scaled else None
    opcheck("rowwise_adagrad_update", (*arguments, scale, 0.1, 1e-8, 0.0))


def test_a_compiled_step_is_the_eager_step() -> None:
    arguments = case(16, torch.float32)
    compiled = torch.compile(rowwise_adagrad_update, fullgraph=True)
    actual, expected = updated(compiled, arguments), updated(rowwise_adagrad_update, arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_table_that_requires_a_gradient_is_updated_in_place() -> None:
    table, state, rows, values = case(4, torch.float32)
    parameter = torch.nn.Parameter(table.clone())
    rowwise_adagrad_update(parameter, state.clone(), rows, values, **NUMBERS)
    assert torch.equal(parameter.detach(), updated(rowwise_adagrad_update, (table, state, rows, values))[0])


def test_autograd_learns_that_the_table_has_changed() -> None:
    """A graph that has saved the table refuses to run with other values than it was built with."""
    table, state, rows, values = case(4, torch.float32)
    parameter = torch.nn.Parameter(table)
    loss = (parameter * parameter).sum()
    rowwise_adagrad_update(parameter, state, rows, values, **NUMBERS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


TABLE, STATE, ROWS, VALUES = case(4, torch.float32, 6, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"table": [1]}, TypeError, "table: expected a torch.Tensor, got list"),
        ({"table": TABLE.int()}, TypeError, "table: expected dtype float32 or"),
        ({"table": TABLE[:, ::2]}, ValueError, "table|values"),
        ({"table": torch.randn(6, 8)[:, ::2]}, ValueError, "table: expected a contiguous tensor"),
        ({"state": STATE.double()}, TypeError, "state: expected dtype float32, got float64"),
        ({"state": STATE[:5]}, ValueError, r"state: expected shape \(6\), got shape \(5,\)"),
        ({"rows": ROWS.int()}, TypeError, "rows: expected dtype int64, got int32"),
        ({"rows": ROWS[:2]}, ValueError, r"values: expected shape \(2, 4\), got shape \(3, 4\)"),
        ({"rows": torch.tensor([0, 2, 2])}, ValueError, "rows: expected ascending rows, each once"),
        ({"rows": torch.tensor([2, 1, 3])}, ValueError, "rows: expected ascending rows, each once"),
        ({"rows": torch.tensor([0, 1, 6])}, ValueError, r"rows: expected rows from 0 to 5, got 0 \.\. 6"),
        ({"rows": torch.tensor([-1, 1, 2])}, ValueError, r"rows: expected rows from 0 to 5, got -1 \.\. 2"),
        ({"values": VALUES.double()}, TypeError, "values: expected dtype float32, got float64"),
        ({"scale": 0.5}, TypeError, "scale: expected a torch.Tensor, got float"),
        ({"scale": torch.ones(2)}, ValueError, r"scale: expected one element, got shape \(2,\)"),
        ({"scale": torch.ones((), dtype=torch.float64)}, TypeError, "scale: expected dtype float32, got float64"),
        ({"values": VALUES.to("meta")}, ValueError, "values: expected device cpu"),
        ({"lr": -1.0}, ValueError, "lr: expected a finite number of at least 0, got -1.0"),
        ({"eps": 0.0}, ValueError, "eps: expected a finite number above 0, got 0.0"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay: expected a finite number"),
    ],
)
def test_wrong_arguments(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"table": TABLE.clone(), "state": STATE.clone(), "rows": ROWS, "values": VALUES, "lr": 0.1, **change}
    with pytest.raises(error, match=f"rowwise_adagrad_update: ({message})"):
        rowwise_adagrad_update(**arguments)


@pytest.mark.parametrize("rows", [[0, 2, 2], [2, 1, 3], [0, 1, 6], [-1, 1, 2]])
def test_the_op_itself_refuses_rows_that_it_cannot_write(rows: list[int]) -> None:
    with pytest.raises(RuntimeError, match="rowwise_adagrad_update: rows: expected ascending rows below 6"):
        torch.ops.blt_kernels.rowwise_adagrad_update(
            TABLE.clone(), STATE.clone(), torch.tensor(rows), VALUES, None, 0.1, 1e-8, 0.0
        )
