"""Optimisation with row-sparse gradients, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ._checks import check_number, check_tensor, fail_type, fail_value
from .ops.rowwise_adagrad_update import rowwise_adagrad_update, state_dtype


class RowwiseAdagrad(torch.optim.Optimizer):
    """Row-wise Adagrad for hash tables: one number of state for each row, and a step that touches only the rows read.

    It takes row-sparse gradients, such as those of `hash_ngram_embedding(sparse_grad=True)`, and updates table and
    state in one pass over them; see `rowwise_adagrad_update` for the formula. `torch.optim.SparseAdam` keeps two
    tables of state beside the table and goes over the gradient several times.

    Args:
        params: tables [R, D], contiguous, float32, float64, bfloat16 or float16, or groups of them.
        lr: learning rate, at least 0.
        eps: above 0; keeps the step finite while the state of a row is 0.
        weight_decay: decoupled decay, at least 0, of the rows that a gradient touches.

    Raises:
        TypeError, ValueError: a number that is none of these.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 3e-2,
        *,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ):
        check_number("RowwiseAdagrad", "lr", lr, 0)
        check_number("RowwiseAdagrad", "eps", eps, 0, above=True)
        check_number("RowwiseAdagrad", "weight_decay", weight_decay, 0)
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, scale: torch.Tensor | None = None
    ) -> float | None:
        """Updates the rows of every table that has a gradient.

        Args:
            closure: computes the loss again, as for every torch optimiser.
            scale: a factor of all gradients, a tensor with one element: the second result of `grad_norm_and_scale`
                clips them without a pass over them.

        Returns:
            What `closure` returned.

        Raises:
            TypeError, ValueError: a gradient that is not row-sparse, or a wrong `scale`.
        """
        if scale is not None:
            check_tensor("RowwiseAdagrad", "scale", scale)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                if not table.grad.is_sparse or table.grad.sparse_dim() != 1:
                    raise fail_type("RowwiseAdagrad", "grad", "a row-sparse gradient", f"layout {table.grad.layout}")
                grad = table.grad.coalesce()  # ours are coalesced already, which makes this free
                state = self.state[table]
                if not state:
                    state["sum"] = torch.zeros(table.shape[0], dtype=state_dtype(table), device=table.device)
                rowwise_adagrad_update(
                    table,
                    state["sum"],
                    grad._indices()[0],
                    grad._values(),
                    lr=group["lr"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    scale=None if scale is None else scale.to(table.device, state_dtype(table)),
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave. The state keeps its dtype, which torch would make that of the table.

        Raises:
            ValueError: it is the state of another optimiser or of other tables.
        """
        tables = [table for group in self.param_groups for table in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        kept = {}
        for table, index in zip(tables, saved, strict=False):  # torch refuses other numbers of tables below
            if index in state_dict["state"]:
                state = state_dict["state"][index]
                if state.keys() != {"sum"} or state["sum"].shape != table.shape[:1]:
                    got = ", ".join(f"{name} {list(getattr(value, 'shape', []))}" for name, value in state.items())
                    expected = f"the state of this optimiser, sum [{table.shape[0]}]"
                    raise fail_value("RowwiseAdagrad", "state_dict", expected, got)
                kept[table] = state["sum"]
        super().load_state_dict(state_dict)
        for table, sums in kept.items():
            self.state[table]["sum"] = sums.to(table.device, state_dtype(table), copy=True)


def grad_norm_and_scale(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The common 2-norm of all gradients, dense and sparse, and the factor that brings it to at most `max_norm`.

    Nothing is scaled yet: `RowwiseAdagrad.step` takes the factor, which spares a pass over the gradients of tables.

    Args:
        parameters: one, or several; those without a gradient are left out.
        max_norm: positive and finite.

    Returns:
        Two scalar tensors, the norm and a factor of at most 1; 0 and 1 where there is no gradient.

    Raises:
        TypeError, ValueError: wrong argument.
    """
    return _norm_and_scale("grad_norm_and_scale", _gradient_values("grad_norm_and_scale", parameters), max_norm)


def clip_grad_norm(parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scales all gradients, dense and sparse together, so that their common 2-norm is at most `max_norm`.

    `torch.nn.utils.clip_grad_norm_` refuses sparse gradients.

    Args:
        parameters: one, or several; those without a gradient are left out.
        max_norm: positive and finite.

    Returns:
        The norm before clipping, a scalar tensor; 0 where there is no gradient.

    Raises:
        TypeError, ValueError: wrong argument.
    """
    values = _gradient_values("clip_grad_norm", parameters)
    norm, scale = _norm_and_scale("clip_grad_norm", values, max_norm)
    _scale(values, scale)
    return norm


def scale_gradients(parameters: torch.Tensor | Iterable[torch.Tensor], scale: torch.Tensor) -> None:
    """Multiplies all gradients, dense and sparse, by a factor such as that of `grad_norm_and_scale`, in place.

    Args:
        parameters: one, or several; those without a gradient are left out.
        scale: a tensor with one element.

    Raises:
        TypeError: wrong argument.
    """
    _scale(_gradient_values("scale_gradients", parameters), scale)


def _gradient_values(op: str, parameters: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The values of all gradients; sparse ones are coalesced first."""
    values = []
    for parameter in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
        if not isinstance(parameter, torch.Tensor):
            raise fail_type(op, "parameters", "tensors", type(parameter).__name__)
        if parameter.grad is not None:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()  # ours are coalesced already, which makes this free
            values.append(parameter.grad._values() if parameter.grad.is_sparse else parameter.grad)
    return values


def _scale(values: list[torch.Tensor], scale: torch.Tensor) -> None:
    if values:
        torch._foreach_mul_(values, scale)


def _norm_and_scale(op: str, values: list[torch.Tensor], max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    check_number(op, "max_norm", max_norm, 0, above=True)
    if not values:
        return torch.zeros(()), torch.ones(())
    norm = torch.nn.utils.get_total_norm(values)
    return norm, clip_scale(norm, max_norm)


def clip_scale(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """The factor, at most 1, that brings gradients of this 2-norm, a scalar tensor, to at most `max_norm`."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
