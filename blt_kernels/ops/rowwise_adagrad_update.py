"""rowwise_adagrad_update: one optimiser step of the rows of a table that a batch has read."""

from __future__ import annotations

import torch

from .. import reference
from .._checks import (
    FLOAT_DTYPES,
    can_look_at,
    check_device,
    check_number,
    check_shape,
    check_tensor,
    fail_value,
)
from ..backend import backend_for

_OP = "rowwise_adagrad_update"


def rowwise_adagrad_update(
    table: torch.Tensor,
    state: torch.Tensor,
    rows: torch.Tensor,
    values: torch.Tensor,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    scale: torch.Tensor | None = None,
) -> None:
    """Updates rows of a table in place by Adagrad with one number of state for each row.

    With g = scale * values[i] and r = rows[i]:

        state[r] += mean(g^2)
        table[r] = (1 - lr * weight_decay) * table[r] - lr / (sqrt(state[r]) + eps) * g

    This is the row-wise Adagrad of large embedding tables (Naumov et al., arXiv 1906.00091; FBGEMM): an adaptive step
    for 1 / D of Adagrad's state. Rows that are not listed keep their values and state, so the decay reaches the rows
    that a batch reads. Arithmetic is in fp32 (fp64 for float64), and the new row is rounded once.

    Args:
        table: [R, D] float32, float64, bfloat16 or float16, contiguous; changed in place.
        state: [R] float32, float64 for a float64 table, contiguous; changed in place.
        rows: int64 [n], ascending, each in 0 .. R-1: the indices of a coalesced sparse gradient.
        values: [n, D] in the dtype of `table`: its values.
        lr: learning rate, at least 0.
        eps: above 0; keeps the step finite while the state is 0.
        weight_decay: decoupled decay, at least 0.
        scale: a factor of all gradients, such as that of clipping: a tensor with one element in the dtype of `state`.
            None: 1.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes, devices or numbers that do not fit; on the CPU, and on CUDA with BLT_KERNELS_DEBUG=1, rows
            out of range or not ascending. Otherwise rows out of range are left out on CUDA.
    """
    check_tensor(_OP, "table", table, ndim=2, dtypes=FLOAT_DTYPES)
    check_tensor(_OP, "state", state, dtypes=(state_dtype(table),))
    check_shape(_OP, "state", state, table.shape[:1])
    check_tensor(_OP, "rows", rows, ndim=1, dtypes=(torch.int64,))
    check_tensor(_OP, "values", values, dtypes=(table.dtype,))
    check_shape(_OP, "values", values, (rows.shape[0], table.shape[1]))
    if scale is not None:
        check_tensor(_OP, "scale", scale, dtypes=(state.dtype,))
        if scale.numel() != 1:
            raise fail_value(_OP, "scale", "one element", f"shape {tuple(scale.shape)}")
        check_device(_OP, "scale", scale, table.device, "table")
    for name, tensor in (("state", state), ("rows", rows), ("values", values)):
        check_device(_OP, name, tensor, table.device, "table")
    for name, tensor in (("table", table), ("state", state)):
        if not tensor.is_contiguous():
            raise fail_value(_OP, name, "a contiguous tensor, because it is changed in place", f"{tensor.stride()}")
    check_number(_OP, "lr", lr, 0)
    check_number(_OP, "eps", eps, 0, above=True)
    check_number(_OP, "weight_decay", weight_decay, 0)
    if can_look_at(rows) and rows.shape[0] > 0:
        if not bool((rows[1:] > rows[:-1]).all()):
            raise fail_value(_OP, "rows", "ascending rows, each once", "others: coalesce the gradient first")
        if int(rows[0]) < 0 or int(rows[-1]) >= table.shape[0]:
            got = f"{int(rows[0])} .. {int(rows[-1])}"
            raise fail_value(_OP, "rows", f"rows from 0 to {table.shape[0] - 1}", got)
    if backend_for(_OP, table.device) == "reference":
        reference.rowwise_adagrad_update(
            table, state, rows, values, lr=lr, eps=eps, weight_decay=weight_decay, scale=scale
        )
        return
    with torch.no_grad():
        torch.ops.blt_kernels.rowwise_adagrad_update(table, state, rows, values, scale, lr, eps, weight_decay)
    # Autograd learns of changes by torch's own ops alone; a graph that has saved the table must not be run after this.
    torch.autograd.graph.increment_version((table, state))


def state_dtype(table: torch.Tensor) -> torch.dtype:
    """The dtype of the state of a table: that of its arithmetic."""
    return torch.float64 if table.dtype == torch.float64 else torch.float32


@torch.library.register_fake("blt_kernels::rowwise_adagrad_update")
def _fake(
    table: torch.Tensor,
    state: torch.Tensor,
    rows: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor | None,
    lr: float,
    eps: float,
    weight_decay: float,
) -> None:
    return None
