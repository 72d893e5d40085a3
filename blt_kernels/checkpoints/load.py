"""Loading a model from any directory that holds one."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..model import BLT, EntropyModel
from ..training.patcher import Patcher
from ..training.trainer import load_model


def load_any(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[EntropyModel | BLT, Patcher | None]:
    """The model of a directory, in eval mode, and the patcher that cuts its text.

    Args:
        path: a run, or one of its checkpoints.
        dtype: of the parameters of the model; None: as they were saved. The entropy model of the patcher stays float32.
        device: of all parameters; None: the CPU.

    Returns:
        The model; for a BLT its patcher, or None where the directory holds none.

    Raises:
        CheckpointError: there is no model, or it is damaged; names the file and the reason.
    """
    model, patcher, _ = load_model(Path(path))
    model = model.to(device=device, dtype=dtype)
    if patcher is not None and patcher.entropy_model is not None:
        patcher.entropy_model.to(device=device)
    return model, patcher
