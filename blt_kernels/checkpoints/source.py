"""Directories of published formats, recognised and described before a tensor of them is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ..model import BLTConfig
from ..training.checkpoint import CheckpointError, reading
from . import meta_format, transformers_format
from .description import Description
from .fields import Fields, read_json
from .meta_fields import IGNORED_SUFFIX
from .tensors import INDEX_FILE, Entry, entries_of

ENTROPY_FOLDER = "entropy_model"


@dataclasses.dataclass(frozen=True)
class Source:
    """What a directory of a published format holds.

    Attributes:
        path: the directory.
        description: models and patcher, without their weights.
        entries: the tensors by name; those of an entropy model that has its own files are behind `patcher.`.
        tensor_names: the names of the tensors that make up one of ours.
    """

    path: Path
    description: Description
    entries: dict[str, Entry]
    tensor_names: Callable[[str, BLTConfig], tuple[str, ...]]


def is_published(path: Path) -> bool:
    """Whether a directory looks like one of a published format, and not like a run."""
    return (path / "config.json").exists() or (path / "params.json").exists()


def published_source(path: Path) -> Source | None:
    """What `path` holds in a published format; None where it is not a directory of one.

    Raises:
        CheckpointError: a file is missing, malformed, or describes a model that ours cannot be; names the field.
    """
    if not is_published(path):
        return None
    config_file = path / "config.json"
    if config_file.exists():
        root = _root(config_file)
        if root.has("args"):
            return _meta(path, root)
        kind = root.get("model_type")
        if kind != "blt":
            hint = "; `blt-kernels byteify` starts a BLT from it" if kind == "llama" else ""
            raise CheckpointError(f"{config_file}: model_type: expected 'blt', got {kind!r}{hint}")
        with reading(config_file):
            description = transformers_format.describe(root)
        entries = safetensors_of(path)
        if description.patcher is not None and description.entropy_model is None:
            # Every byte is a patch, and the entropy model that may be there is not asked.
            entries = {name: entry for name, entry in entries.items() if not name.startswith("model.patcher.")}
        return Source(path, description, entries, transformers_format.tensor_names)
    return _meta(path, _root(path / "params.json"))


def _root(file: Path) -> Fields:
    return Fields(file, read_json(file))


def _meta(path: Path, root: Fields) -> Source:
    folder = path / ENTROPY_FOLDER
    entropy_root = None
    if folder.is_dir():
        params_file = folder / "params.json"
        entropy_root = _root(params_file if params_file.exists() else folder / "config.json")
    with reading(path):
        description = meta_format.describe(root, entropy_root)
    entries = _meta_entries(path)
    if description.entropy_model is not None:
        entries |= {f"patcher.{name}": entry for name, entry in _meta_entries(folder).items()}
    return Source(path, description, entries, meta_format.tensor_names)


def _meta_entries(path: Path) -> dict[str, Entry]:
    consolidated = path / "consolidated.pth"
    entries = entries_of(consolidated) if consolidated.exists() else safetensors_of(path)
    return {name: entry for name, entry in entries.items() if not name.endswith(IGNORED_SUFFIX)}


def safetensors_of(path: Path) -> dict[str, Entry]:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Where both are there, the first is taken, as transformers does.

    Raises:
        CheckpointError: a file is missing or damaged, or the index and the shards do not agree.
    """
    index_file, whole = path / INDEX_FILE, path / "model.safetensors"
    if whole.exists() or not index_file.exists():
        return entries_of(whole)
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_file}: weight_map: expected an object from names to files")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index_file}: weight_map: expected files of this directory, got {shard!r}")
        found = entries_of(path / shard)
        stray = [name for name in found if weight_map.get(name) != shard]
        absent = [name for name, file in weight_map.items() if file == shard and name not in found]
        for problem, names in (("does not say that it holds", stray), ("says that it holds", absent)):
            if names:
                raise CheckpointError(f"{path / shard}: {INDEX_FILE} {problem} {names[0]}, which is wrong")
        entries |= found
    return entries
