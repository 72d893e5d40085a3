"""rowwise_adagrad_update against its definition and against the usual form in PyTorch (index_add_), both eager and
compiled, and against a step of torch.optim.SparseAdam, which keeps two tables of state and takes other steps.

The sweep is over the rows that a gradient lists. They lie far apart in a table that exceeds every cache, as those of
hashed n-grams do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from blt_kernels import reference, rowwise_adagrad_update
from blt_kernels.ops.rowwise_adagrad_update import state_dtype

from .cases import Case, Headline, Setting, assert_close, in_report

# Rows of the table, D, rows that the gradient lists: the headline shape, the sweep around it, and other widths.
HEADLINE_SHAPE = {
    "cpu": (600_000, 512, 40_000),
    "cuda": (4_000_000, 1024, 400_000),  # 8 GB of table, of which 2.4 GB move
    "tiny": (2000, 64, 200),
}
SWEEP = {"cpu": (2500, 10_000, 40_000, 160_000), "cuda": (25_000, 100_000, 400_000), "tiny": (200,)}
OTHER_SHAPES = {"cpu": ((300_000, 1024, 40_000), (600_000, 64, 40_000)), "cuda": (), "tiny": ()}
HEADLINES: dict[str, Headline] = {"update": "results"}
LR, EPS = 1e-3, 1e-10

Update = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def ours(table: Tensor, state: Tensor, rows: Tensor, values: Tensor) -> None:
    rowwise_adagrad_update(table, state, rows, values, lr=LR, eps=EPS)


def definition(table: Tensor, state: Tensor, rows: Tensor, values: Tensor) -> None:
    reference.rowwise_adagrad_update(table, state, rows, values, lr=LR, eps=EPS)


@torch.no_grad()
def with_index_add(table: Tensor, state: Tensor, rows: Tensor, values: Tensor) -> None:
    """What one would write: the weights are never gathered. In bf16 the change is rounded before it is added."""
    state.index_add_(0, rows, values.to(state.dtype).square().mean(1))
    step = -LR / (state[rows].sqrt() + EPS)
    table.index_add_(0, rows, (step[:, None] * values).to(table.dtype))


def cases(setting: Setting) -> Iterator[Case]:
    headline = HEADLINE_SHAPE[setting.scale]
    table_rows, width, _ = headline
    sweep = [(table_rows, width, count) for count in SWEEP[setting.scale]]
    for shape in (headline,) if setting.quick else sweep:
        yield from in_report(cases_of(setting, *shape), shape[2], HEADLINES if shape == headline else None)
    for shape in () if setting.quick else OTHER_SHAPES[setting.scale]:
        yield from cases_of(setting, *shape)


def cases_of(setting: Setting, table_rows: int, width: int, count: int) -> Iterator[Case]:
    table = setting.randn(1000, width).repeat(table_rows // 1000, 1)
    state = torch.zeros(table_rows, device=setting.device, dtype=state_dtype(table))
    rows = torch.randperm(table_rows)[:count].sort().values.to(setting.device)
    values = setting.randn(count, width)
    functions: dict[str, Update] = {
        "ours": ours,
        "reference": definition,
        "reference compiled": torch.compile(definition, dynamic=False),
        "index_add": with_index_add,
        "index_add compiled": torch.compile(with_index_add, dynamic=False),
    }

    def check() -> None:
        before = table[rows]
        results = []
        for update in functions.values():
            update(table, state, rows, values)
            results.append((table[rows], state[rows]))
            table[rows], state[rows] = before, 0.0
        (first_table, first_state), *others = results
        for other_table, other_state in others:
            assert_close(first_table, other_table, (table,))
            assert_close(first_state, other_state, ())

    parameter = torch.nn.Parameter(table)
    parameter.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=False)
    variants: dict[str, Callable[[], object]] = {
        **{name: partial(update, table, state, rows, values) for name, update in functions.items()},
        # A captured graph repeats one step's number; the time is the same.
        "SparseAdam": torch.optim.SparseAdam([parameter], lr=LR).step,
    }
    moved = rows.nbytes + 3 * values.nbytes + 2 * count * state.element_size()
    yield Case("update", {"R": table_rows, "D": width, "rows": count}, variants, moved, check)
