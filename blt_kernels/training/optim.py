"""AdamW for dense parameters and a sparse optimiser for hash tables, under one schedule and one clipping norm."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from .._checks import check_choice, check_int, check_number, fail_type, fail_value
from ..optim import RowwiseAdagrad, grad_norm_and_scale, scale_gradients

if TYPE_CHECKING:
    from .sharding import Sharding

_LATENT = "global_transformer.layers."
TABLE_OPTIMIZERS = ("rowwise_adagrad", "sparse_adam")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How parameters are updated. Defaults: the paper's section on training (AdamW 0.9/0.95, decay 0.1, clip 1.0), and
    for hash tables what did best in `python -m benchmarks tables`.

    Attributes:
        learning_rate: peak learning rate of AdamW, above 0.
        sparse_learning_rate: peak learning rate of hash tables, above 0.
        min_ratio: the schedule ends at this fraction of the peak, 0 .. 1.
        warmup_steps: steps in which the learning rate rises from 0 to its peak; 0 starts at the peak. A run of fewer
            than twice as many steps warms up for half of its steps.
        betas: decay rates of Adam's two moments, each at least 0 and below 1.
        eps: Adam's epsilon, above 0.
        weight_decay: decay of the matrices that AdamW updates, at least 0.
        clip_norm: largest 2-norm of all gradients together, above 0.
        table_optimizer: of hash tables: "rowwise_adagrad" (`RowwiseAdagrad`: one number of state for each row) or
            "sparse_adam" (`torch.optim.SparseAdam`: two tables of state).
        latent_lr_scale: the layers of the latent transformer learn at this multiple of learning_rate, above 0. The
            paper takes 0.1 where they come from a token model.
    """

    learning_rate: float = 4e-4
    sparse_learning_rate: float = 3e-2
    min_ratio: float = 0.0
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    table_optimizer: str = "rowwise_adagrad"
    latent_lr_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "sparse_learning_rate", "eps", "clip_norm", "latent_lr_scale"):
            check_number("OptimConfig", name, getattr(self, name), 0, above=True)
        check_choice("OptimConfig", "table_optimizer", self.table_optimizer, TABLE_OPTIMIZERS)
        check_number("OptimConfig", "min_ratio", self.min_ratio, 0, 1)
        check_number("OptimConfig", "weight_decay", self.weight_decay, 0)
        check_int("OptimConfig", "warmup_steps", self.warmup_steps, 0)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise fail_type("OptimConfig", "betas", "two numbers", repr(self.betas))
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON gives a list
        for beta in self.betas:
            check_number("OptimConfig", "betas", beta, 0)
            if beta >= 1:
                raise fail_value("OptimConfig", "betas", "numbers below 1", beta)


class Optimizers:
    """AdamW over the dense parameters and a sparse optimiser over hash tables, stepped as one.

    Args:
        model: parameters of embeddings with `sparse=True` go to the sparse optimiser.
        config: see OptimConfig.
        total_steps: length of the schedule, at least 1: linear warm-up, then cosine to `min_ratio`.
        sharding: how the model is divided among ranks; None: this process has all of it.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, total_steps: int, sharding: Sharding | None = None):
        check_int("Optimizers", "total_steps", total_steps, 1)
        tables = {
            id(parameter)
            for module in model.modules()
            if getattr(module, "sparse", False)
            for parameter in module.parameters(recurse=False)
        }
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        latent = [p for name, p in named if name.startswith(_LATENT) and config.latent_lr_scale != 1]
        slow = {id(parameter) for parameter in latent}
        dense = [parameter for _, parameter in named if id(parameter) not in tables | slow]
        self._parameters = [parameter for _, parameter in named]
        self._config = config
        self._sharding = sharding
        self.optimizers: list[torch.optim.Optimizer] = [self._adamw(dense, config.learning_rate)]
        sparse = [parameter for _, parameter in named if id(parameter) in tables]
        if sparse and config.table_optimizer == "rowwise_adagrad":
            rate = config.sparse_learning_rate
            self.optimizers.append(RowwiseAdagrad(sparse, rate) if sharding is None else sharding.rowwise_adagrad(rate))
        elif sparse:
            self.optimizers.append(
                torch.optim.SparseAdam(sparse, lr=config.sparse_learning_rate, betas=config.betas, eps=config.eps)
            )
        if latent:
            self.optimizers.append(self._adamw(latent, config.learning_rate * config.latent_lr_scale))
        self.schedulers = [self._schedule(optimizer, total_steps) for optimizer in self.optimizers]

    def _adamw(self, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        config = self._config
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=rate, betas=config.betas, eps=config.eps, fused=True)

    def _schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
        warmup = min(self._config.warmup_steps, max(1, total_steps // 2))
        lowest = optimizer.param_groups[0]["lr"] * self._config.min_ratio
        if warmup == 0:
            return CosineAnnealingLR(optimizer, total_steps, eta_min=lowest)
        rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        fall = CosineAnnealingLR(optimizer, max(1, total_steps - warmup), eta_min=lowest)
        return SequentialLR(optimizer, [rise, fall], milestones=[warmup])

    @property
    def learning_rate(self) -> float:
        return float(self.schedulers[0].get_last_lr()[0])

    def step(self) -> torch.Tensor:
        """Clips, updates, advances the schedule and clears the gradients. Returns the norm before clipping."""
        if self._sharding is None:
            norm, scale = grad_norm_and_scale(self._parameters, self._config.clip_norm)
        else:
            norm, scale = self._sharding.norm_and_scale(self._parameters, self._config.clip_norm)
        scale_all = scale_gradients if self._sharding is None else self._sharding.scale_gradients
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            if isinstance(optimizer, RowwiseAdagrad):
                optimizer.step(scale=scale)
            else:
                scale_all(_parameters_of(optimizer), scale)
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Tensors by name, for safetensors, and everything else, for JSON: tensors of one number too.

        A tensor that belongs to a parameter has its shape. On many ranks it is this rank's part; see `Sharding`.
        """
        tensors: dict[str, torch.Tensor] = {}
        rest = []
        for i, (optimizer, scheduler) in enumerate(zip(self.optimizers, self.schedulers, strict=True)):
            state = optimizer.state_dict()
            numbers: dict[str, dict[str, Any]] = {}
            for index, slots in state["state"].items():
                for slot, value in slots.items():
                    if isinstance(value, torch.Tensor) and value.dim() > 0:
                        tensors[f"{i}.{index}.{slot}"] = value
                    else:
                        number = value.item() if isinstance(value, torch.Tensor) else value
                        numbers.setdefault(str(index), {})[slot] = number
            rest.append({"numbers": numbers, "param_groups": state["param_groups"], "schedule": scheduler.state_dict()})
        return tensors, rest

    def owner(self, name: str) -> nn.Parameter:
        """The parameter that a tensor of `state_dict` belongs to, by the name of the tensor."""
        i, index, _ = name.split(".")
        return _parameters_of(self.optimizers[int(i)])[int(index)]

    def load_state_dict(self, tensors: dict[str, torch.Tensor], rest: list[dict[str, Any]]) -> None:
        """Restores what `state_dict` gave, for a model with the same parameters.

        Raises:
            ValueError: a tensor does not have the shape of its parameter.
        """
        for i, (optimizer, scheduler) in enumerate(zip(self.optimizers, self.schedulers, strict=True)):
            parameters = _parameters_of(optimizer)
            slots: dict[int, dict[str, Any]] = {}
            for name, tensor in tensors.items():
                owner, index, slot = name.split(".")
                if int(owner) == i:
                    shape = parameters[int(index)].shape
                    if isinstance(optimizer, RowwiseAdagrad):
                        shape = shape[:1]
                    if tensor.shape != shape:  # torch would fail at the first step
                        raise fail_value("Optimizers", name, f"shape {tuple(shape)}", f"shape {tuple(tensor.shape)}")
                    slots.setdefault(int(index), {})[slot] = tensor
            for index, numbers in rest[i]["numbers"].items():
                slots.setdefault(int(index), {}).update(numbers)
            optimizer.load_state_dict({"state": slots, "param_groups": rest[i]["param_groups"]})
            scheduler.load_state_dict(rest[i]["schedule"])


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
