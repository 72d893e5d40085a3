"""rowwise_adagrad_update against its definition in eager and compiled PyTorch, and against torch.optim.SparseAdam,
which keeps two tables of state and takes other steps.

The rows that a gradient lists lie far apart in a table that exceeds every cache, as those of hashed n-grams do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from blt_kernels import reference, rowwise_adagrad_update

from .cases import Case, Headline, Setting, assert_close

# Rows of the table, D, rows that the gradient lists; the first one is shown in the report.
SHAPES = ((600_000, 512, 40_000), (300_000, 1024, 100_000), (100_000, 256, 10_000))
HEADLINE: Headline = "readme"
LR = 1e-3


def cases(setting: Setting) -> Iterator[Case]:
    for shape in SHAPES[:1] if setting.quick else SHAPES:
        yield case_of(setting, *shape, HEADLINE if shape == SHAPES[0] else None)


def case_of(setting: Setting, table_rows: int, width: int, count: int, headline: Headline | None) -> Case:
    table = setting.randn(1000, width).repeat(table_rows // 1000, 1)
    state = torch.zeros(table_rows, device=setting.device)
    rows = torch.randperm(table_rows)[:count].sort().values.to(setting.device)
    values = setting.randn(count, width)
    parameter = torch.nn.Parameter(table.clone())
    parameter.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=False)
    adam = torch.optim.SparseAdam([parameter], lr=LR)
    compiled = torch.compile(reference.rowwise_adagrad_update, dynamic=False)

    def check() -> None:
        ours, theirs = table.clone(), table.clone()
        rowwise_adagrad_update(ours, state.clone(), rows, values, lr=LR)
        reference.rowwise_adagrad_update(theirs, state.clone(), rows, values, lr=LR)
        assert_close(ours[rows], theirs[rows], (table,))

    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: rowwise_adagrad_update(table, state, rows, values, lr=LR),
        "reference": lambda: reference.rowwise_adagrad_update(table, state, rows, values, lr=LR),
        "reference compiled": lambda: compiled(table, state, rows, values, lr=LR),
        "SparseAdam": adam.step,
    }
    moved = rows.nbytes + 3 * values.nbytes + 2 * count * state.element_size()
    # SparseAdam keeps the number of its steps on the host, which a captured graph would not count.
    return Case(
        "step", {"R": table_rows, "D": width, "n": count}, variants, moved, check, graph=False, headline=headline
    )
