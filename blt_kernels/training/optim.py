"""AdamW for dense parameters and SparseAdam for hash tables, under one learning-rate schedule and one clipping norm."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from ..optim import clip_grad_norm


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How parameters are updated. Defaults: the paper's section on training (AdamW 0.9/0.95, decay 0.1, clip 1.0)."""

    learning_rate: float = 4e-4
    sparse_learning_rate: float = 4e-4
    min_ratio: float = 0.0  # the schedule ends at this fraction of the learning rate
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


class Optimizers:
    """AdamW over the dense parameters and SparseAdam over those whose gradients are sparse, stepped as one.

    Args:
        model: parameters of embeddings with `sparse=True` go to SparseAdam.
        config: see OptimConfig.
        total_steps: length of the schedule: linear warm-up, then cosine to `min_ratio`.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, total_steps: int):
        tables = {
            id(parameter)
            for module in model.modules()
            if getattr(module, "sparse", False)
            for parameter in module.parameters(recurse=False)
        }
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        dense = [parameter for _, parameter in named if id(parameter) not in tables]
        self._parameters = [parameter for _, parameter in named]
        self._config = config
        groups = [
            {"params": [p for p in dense if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in dense if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
        ]
        sparse = [parameter for _, parameter in named if id(parameter) in tables]
        if sparse:
            self.optimizers.append(
                torch.optim.SparseAdam(sparse, lr=config.sparse_learning_rate, betas=config.betas, eps=config.eps)
            )
        self.schedulers = [self._schedule(optimizer, total_steps) for optimizer in self.optimizers]

    def _schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> SequentialLR:
        warmup = min(self._config.warmup_steps, max(1, total_steps // 2))
        rate = optimizer.param_groups[0]["lr"]
        rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        fall = CosineAnnealingLR(optimizer, max(1, total_steps - warmup), eta_min=rate * self._config.min_ratio)
        return SequentialLR(optimizer, [rise, fall], milestones=[warmup])

    @property
    def learning_rate(self) -> float:
        return float(self.schedulers[0].get_last_lr()[0])

    def step(self) -> torch.Tensor:
        """Clips, updates, advances the schedule and clears the gradients. Returns the norm before clipping."""
        norm = clip_grad_norm(self._parameters, self._config.clip_norm)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Tensors by name, for safetensors, and everything else, for JSON."""
        tensors: dict[str, torch.Tensor] = {}
        rest = []
        for i, (optimizer, scheduler) in enumerate(zip(self.optimizers, self.schedulers, strict=True)):
            state = optimizer.state_dict()
            numbers: dict[str, dict[str, Any]] = {}
            for index, slots in state["state"].items():
                for slot, value in slots.items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"{i}.{index}.{slot}"] = value
                    else:
                        numbers.setdefault(str(index), {})[slot] = value
            rest.append({"numbers": numbers, "param_groups": state["param_groups"], "schedule": scheduler.state_dict()})
        return tensors, rest

    def load_state_dict(self, tensors: dict[str, torch.Tensor], rest: list[dict[str, Any]]) -> None:
        """Restores what `state_dict` gave, for a model with the same parameters."""
        for i, (optimizer, scheduler) in enumerate(zip(self.optimizers, self.schedulers, strict=True)):
            slots: dict[int, dict[str, Any]] = {}
            for name, tensor in tensors.items():
                owner, index, slot = name.split(".")
                if int(owner) == i:
                    slots.setdefault(int(index), {})[slot] = tensor
            for index, numbers in rest[i]["numbers"].items():
                slots.setdefault(int(index), {}).update(numbers)
            optimizer.load_state_dict({"state": slots, "param_groups": rest[i]["param_groups"]})
            scheduler.load_state_dict(rest[i]["schedule"])
