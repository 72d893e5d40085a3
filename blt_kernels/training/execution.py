"""How a model computes its training steps: compiled or not, with activations kept or computed again.

Neither decides what is learned: compiled code rounds otherwise, and checkpointing changes not a bit. So a run may be
resumed with other choices.
"""

from __future__ import annotations

import contextlib

import torch

from .._checks import fail_value
from ..model import BLT, EntropyModel, checkpoint_activations
from .ranks import world_size

BACKEND = "inductor"  # of torch.compile


def prepare(model: EntropyModel | BLT, *, compiled: bool, checkpointed: bool) -> None:
    """Sets how `model` computes from now on.

    Args:
        compiled: its forward pass is one graph. All batches of a loader have the same shapes, so it is compiled once,
            in the first step. `model.loss` calls it; weights keep their names.
        checkpointed: see `model.checkpoint_activations`.

    Raises:
        ValueError: `compiled` on many ranks, where FSDP's hooks between the layers would break the graph.
    """
    if compiled and world_size() > 1:
        raise fail_value("train", "compile", "False on many ranks, where FSDP works between the layers", True)
    checkpoint_activations(model, checkpointed)
    model._compiled_call_impl = None  # of an earlier run of this model
    if compiled:
        model.compile(fullgraph=True, dynamic=False, backend=BACKEND)


def uncompiled(model: EntropyModel | BLT) -> contextlib.AbstractContextManager[None]:
    """In the block `model` runs as it is written. Evaluation is too short to compile the graph once more for it."""
    if model._compiled_call_impl is None:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
