"""Models and patchers from the checkpoints of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model import BLT, BLTConfig, EntropyModel, EntropyModelConfig
from .checkpoint import STATE_FILE, CheckpointError, latest_checkpoint, load_checkpoint, reading
from .patcher import Patcher


def load_patcher(path: Path, device: str | torch.device = "cpu") -> tuple[Patcher | None, dict[str, Any]]:
    """What `load_model` returns besides the model, which is not read.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = latest_checkpoint(Path(path))
    tensors, state, _ = load_checkpoint(path, groups=("entropy_model",))
    with reading(path / STATE_FILE):
        return _patcher_of(tensors, state, device), state


def load_model(
    path: Path, device: str | torch.device = "cpu"
) -> tuple[EntropyModel | BLT, Patcher | None, dict[str, Any]]:
    """A model from a checkpoint, or from the newest one of a run, in eval mode on `device`, its patcher too.

    Returns:
        The model; for a BLT the patcher it was trained with, else None; the state that was saved with them.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = latest_checkpoint(Path(path))
    tensors, state, _ = load_checkpoint(path)
    with reading(path / STATE_FILE):
        with torch.device("meta"):  # the weights that were read become the model's, without a copy
            model = model_like(state)
        load_weights(model, tensors["model"], path, assign=True)
        patcher = _patcher_of(tensors, state, device)
    return model.eval().to(device), patcher, state


def _patcher_of(tensors: dict[str, Any], state: dict[str, Any], device: str | torch.device) -> Patcher | None:
    if state["patcher"] is None:
        return None
    return Patcher.from_state(state["patcher"], tensors.get("entropy_model", {})).to(device)


def model_like(state: dict[str, Any]) -> EntropyModel | BLT:
    """An untrained model of the shape in the state of a checkpoint."""
    if state["kind"] == "blt":
        return BLT(BLTConfig.from_dict(state["model"]))
    return EntropyModel(EntropyModelConfig.from_dict(state["model"]))


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path, *, assign: bool = False) -> None:
    """Gives a model the weights that were read from the checkpoint `path`; with `assign` they become its own.

    Raises:
        CheckpointError: they do not fit the model.
    """
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        raise CheckpointError(f"{path / 'model.safetensors'}: does not fit the model: {error}") from error
