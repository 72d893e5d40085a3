"""Loading a model from any directory that holds one."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .._checks import fail_type, fail_value
from ..model import BLT, EntropyModel
from ..training.checkpoint import CheckpointError, reading
from ..training.load import load_model
from ..training.patcher import Patcher
from .source import Source, published_source
from .tensors import check_names, common_dtype, load_tensors


def load_any(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[EntropyModel | BLT, Patcher | None]:
    """The model of a directory, in eval mode, and the patcher that cuts its text.

    Args:
        path: a run, one of its checkpoints, or a directory of a published format: see docs/checkpoints.md.
        dtype: of the parameters of the model; None: as they were saved. The entropy model of the patcher stays float32,
            because entropies in bfloat16 would cut other patches.
        device: of all parameters; None: the CPU. Parameters there that need no conversion are a private mapping of
            their files, which must not be written to while the model is in use (to replace them is harmless).

    Returns:
        The model; for a BLT its patcher, or None where the directory holds none.

    Raises:
        CheckpointError: there is no model, it is damaged, or ours cannot be like it; names the file and the reason.
    """
    path, device = Path(path), torch.device("cpu" if device is None else device)
    if not isinstance(dtype, torch.dtype | None):
        raise fail_type("load_any", "dtype", "a torch.dtype or None", type(dtype).__name__)
    if dtype is not None and not dtype.is_floating_point:
        raise fail_value("load_any", "dtype", "a floating-point dtype", str(dtype))
    source = published_source(path)
    if source is None:
        model, patcher, _ = load_model(path, device)
        return model.to(dtype=dtype), patcher
    return _load(source, dtype, device)


def from_pretrained(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[BLT, Patcher | None]:
    """`load_any` for a BLT.

    Raises:
        CheckpointError: as `load_any`.
        ValueError: the directory holds an entropy model alone.
    """
    model, patcher = load_any(path, dtype=dtype, device=device)
    if not isinstance(model, BLT):
        raise fail_value("from_pretrained", "path", "a directory that holds a BLT", f"{path}: {type(model).__name__}")
    return model, patcher


def _load(source: Source, dtype: torch.dtype | None, device: torch.device) -> tuple[BLT, Patcher | None]:
    described = source.description
    _check_layers(source)
    with reading(source.path), torch.device("meta"):
        model = BLT(described.model)
        entropy_model = None if described.entropy_model is None else EntropyModel(described.entropy_model)
    ours = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    if entropy_model is not None:
        ours |= {f"patcher.{name}": tuple(parameter.shape) for name, parameter in entropy_model.state_dict().items()}

    theirs = {name: source.tensor_names(name, described.model) for name in ours}
    shapes = {part: (ours[name][0] // len(parts), *ours[name][1:]) for name, parts in theirs.items() for part in parts}
    check_names(source.path, shapes, source.entries)
    found = {name: tuple(source.entries[part] for part in parts) for name, parts in theirs.items()}
    of_model = {name: entries for name, entries in found.items() if not name.startswith("patcher.")}
    of_patcher = {name.removeprefix("patcher."): found[name] for name in found if name not in of_model}

    if dtype is None:
        dtype = common_dtype(entry for entries in of_model.values() for entry in entries)
    model.load_state_dict(load_tensors(of_model, dtype, device), assign=True)
    if entropy_model is not None:
        entropy_model.load_state_dict(load_tensors(of_patcher, torch.float32, device), assign=True)
    patcher = None if described.patcher is None else Patcher(described.patcher, entropy_model)
    return model.eval(), patcher


def _check_layers(source: Source) -> None:
    """No stack has more layers than there are tensors, since a model of very many layers takes very long to make."""
    model, entropy_model = source.description.model, source.description.entropy_model
    stacks = {"encoder": model.encoder, "latent transformer": model.latent, "decoder": model.decoder}
    if entropy_model is not None:
        stacks["entropy model"] = entropy_model.transformer
    for name, stack in stacks.items():
        if stack.num_layers > len(source.entries):
            raise CheckpointError(
                f"{source.path}: its configuration has {stack.num_layers} layers in the {name}, and its files have "
                f"{len(source.entries)} tensors"
            )
