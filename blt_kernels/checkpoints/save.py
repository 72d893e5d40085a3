"""Writing a model and its patcher in a published format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .._checks import check_choice, check_int, fail_type, fail_value
from .._files import atomic_directory
from ..model import BLT, BLTConfig
from ..training.patcher import Patcher
from . import meta_format, transformers_format
from .description import Description, check_expressible
from .fields import Fields, write_json
from .meta_fields import PATCHER_FIELDS
from .source import ENTROPY_FOLDER
from .tensors import save_tensors

FORMATS = ("transformers", "meta")
_TABLES, _PROJECTION = "encoder_hash_tok_embedding.weight", "hash_projection.weight"


def save_pretrained(
    path: str | os.PathLike[str],
    model: BLT,
    patcher: Patcher | None,
    *,
    format: str = "transformers",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that the published code reads, and `BLT.from_pretrained` too. It appears whole or not at all.

    Tables of another width than the model's (`hash_dim`) are written in the model's width, with their projection
    multiplied in: the same model to rounding, in more memory.

    Args:
        path: the directory to make; it may exist if it is empty.
        patcher: how the model's text is cut, with its entropy model; None: the directory does not say.
        format: "transformers" (`config.json`, safetensors) or "meta" (the same names of files, and the entropy model as
            `entropy_model/params.json` and `consolidated.pth`).
        max_shard_bytes: of "transformers": larger models are written in shards, of at most this size or one tensor.

    Raises:
        TypeError, ValueError: wrong arguments; a model or patcher that the format cannot express, with every field that
            it has no words for; something at `path` already.
        OSError: it cannot be written.
    """
    op = "save_pretrained"
    check_choice(op, "format", format, FORMATS)
    check_int(op, "max_shard_bytes", max_shard_bytes, 1)
    if not isinstance(model, BLT):
        raise fail_type(op, "model", "a BLT", type(model).__name__)
    if patcher is not None and not isinstance(patcher, Patcher):
        raise fail_type(op, "patcher", "a Patcher or None", type(patcher).__name__)
    entropy_model = None if patcher is None else patcher.entropy_model
    described = Description(
        model.config,
        None if patcher is None else patcher.config,
        None if entropy_model is None else entropy_model.config,
    ).normal()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    entropy_weights = {} if entropy_model is None else entropy_model.state_dict()
    entropy_weights = {f"patcher.{name}": tensor for name, tensor in entropy_weights.items()}
    if format == "transformers":
        config = _transformers_config(described, weights)
        with atomic_directory(path) as folder:
            write_json(folder / "config.json", config)
            named = _renamed(_fold_tables(weights) | entropy_weights, described, transformers_format.tensor_names)
            save_tensors(folder, named, max_shard_bytes)
        return
    files = _meta_files(described)
    with atomic_directory(path) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_json(folder / name, content)
        save_tensors(folder, _renamed(_fold_tables(weights), described, meta_format.tensor_names))
        if entropy_weights:
            named = _renamed(entropy_weights, described, meta_format.tensor_names)
            named = {name.removeprefix("patcher."): tensor for name, tensor in named.items()}
            torch.save({"model": named}, folder / ENTROPY_FOLDER / "consolidated.pth")


def _transformers_config(described: Description, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    dtype = str(weights["lm_head.weight"].dtype).removeprefix("torch.")
    config = transformers_format.config_of(described, dtype)
    _check("transformers", described, lambda: transformers_format.describe(Fields(Path("config.json"), config)))
    return config


def _meta_files(described: Description) -> dict[str, dict[str, Any]]:
    rule = meta_format.patcher_args(described.patcher)
    fields = {name: rule[field] for field, name in PATCHER_FIELDS.items() if field in rule}
    files: dict[str, dict[str, Any]] = {"config.json": {"args": meta_format.model_args(described.model) | fields}}
    if described.entropy_model is not None:
        entropy_args = meta_format.entropy_args(described.entropy_model)
        files[f"{ENTROPY_FOLDER}/params.json"] = {"entropy_model": entropy_args, "data": {"patcher_args": rule}}
    roots = [Fields(Path(name), content) for name, content in files.items()]
    _check("meta", described, lambda: meta_format.describe(*roots))
    return files


def _check(format: str, described: Description, describe: Callable[[], Description]) -> None:
    """What is written would be read as what it was written from."""
    try:
        said = describe()
    except (TypeError, ValueError) as error:
        expected = "one that can express this model and its patcher"
        raise fail_value("save_pretrained", "format", expected, f"{format!r} ({error})") from error
    check_expressible(format, described, said)


def _fold_tables(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same without a projection of hash tables: each row of the tables is projected."""
    if _PROJECTION not in weights:
        return weights
    rest = {name: tensor for name, tensor in weights.items() if name not in (_TABLES, _PROJECTION)}
    return rest | {_TABLES: weights[_TABLES] @ weights[_PROJECTION].T}


def _renamed(
    weights: Mapping[str, torch.Tensor],
    described: Description,
    tensor_names: Callable[[str, BLTConfig], tuple[str, ...]],
) -> dict[str, torch.Tensor]:
    """The tensors under their names of a format, in pieces where one of ours is several there."""
    renamed: dict[str, torch.Tensor] = {}
    for ours, tensor in weights.items():
        names = tensor_names(ours, described.model)
        renamed |= zip(names, tensor.split(tensor.shape[0] // len(names)), strict=True)
    return renamed
