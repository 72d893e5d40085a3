"""Tensors in files: found by name, checked against what a model expects, mapped or copied piece by piece.

Nothing here reads a whole file. A tensor that is wanted as it is in the file is a private mapping of it, so that memory
is needed for what is used and only once. One that is wanted in another form is copied in pieces, and the file is opened
anew for each piece, because what was read of a mapping counts as memory until it is closed.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .._optional import optional
from ..training.checkpoint import CheckpointError, reading
from .fields import write_json

PIECE_BYTES = 1 << 26
INDEX_FILE = "model.safetensors.index.json"
_SHOWN = 8  # names in an error message
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file: where it is, what it is called there, its shape, and its dtype if that is floating-point."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None


def entries_of(file: Path) -> dict[str, Entry]:
    """The tensors of a `.safetensors` or `.pth` file by name.

    A `.pth` file is read with weights_only, so that it can run no code, and its tensors are those under "model".

    Raises:
        CheckpointError: the file is missing, cut short or malformed.
    """
    with reading(file):
        if not file.exists():
            raise CheckpointError(f"{file}: missing")
        found = {}
        for name, rows in _open(file).items():
            if isinstance(rows, torch.Tensor):
                shape, dtype = tuple(rows.shape), rows.dtype if rows.is_floating_point() else None
            else:
                shape, dtype = tuple(rows.get_shape()), _SAFETENSORS_DTYPES.get(rows.get_dtype())
            found[name] = Entry(file, name, shape, dtype)
        return found


def _open(file: Path) -> dict[str, Any]:
    """What can be sliced by rows, by name: tensors, or what safetensors gives in their place. Nothing is read yet."""
    if file.suffix == ".safetensors":
        handle = optional("safetensors").safe_open(str(file), framework="pt")
        return {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118, it is no dict
    loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    named = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(named, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in named.values()):
        raise CheckpointError(f"{file}: expected a dict of tensors under the key 'model'")
    return named


def check_names(where: Path, wanted: Mapping[str, tuple[int, ...]], entries: Mapping[str, Entry]) -> None:
    """Every tensor that is wanted is there, in its shape and as floating-point numbers, and no other.

    Raises:
        CheckpointError: names what is missing, unexpected, of another shape or of another type.
    """
    problems = [
        _listed("missing", [name for name in wanted if name not in entries]),
        _listed("unexpected", [name for name in entries if name not in wanted]),
        _listed(
            "of another shape",
            [
                f"{name}: expected {tuple(shape)}, got {entries[name].shape}"
                for name, shape in wanted.items()
                if name in entries and entries[name].shape != tuple(shape)
            ],
        ),
        _listed("not floating-point", [name for name in wanted if name in entries and entries[name].dtype is None]),
    ]
    found = "; ".join(problem for problem in problems if problem)
    if found:
        raise CheckpointError(f"{where}: its tensors do not fit its configuration: {found}")


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{rest}"


def common_dtype(entries: Iterable[Entry]) -> torch.dtype:
    """The dtype that holds the values of all entries, which is theirs where they have one in common."""
    return functools.reduce(torch.promote_types, {entry.dtype for entry in entries if entry.dtype is not None})


def load_tensors(
    parts: Mapping[str, tuple[Entry, ...]], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Tensors by name, each of its parts one after the other along the first dimension.

    A tensor of one part that has the dtype already is a mapping of its file, on the CPU: private, so that training it
    does not change the file.

    Raises:
        CheckpointError: a file cannot be read.
    """
    mapped: dict[Path, dict[str, Any]] = {}
    tensors = {}
    for name, entries in parts.items():
        first = entries[0]
        with reading(first.file):
            if len(entries) == 1 and first.dtype == dtype and device.type == "cpu":
                if first.file not in mapped:
                    mapped[first.file] = _open(first.file)
                tensors[name] = mapped[first.file][first.name][:]
                continue
            rows = sum(entry.shape[0] for entry in entries)
            tensors[name] = out = torch.empty((rows, *first.shape[1:]), dtype=dtype, device=device)
            for entry, piece in zip(entries, out.split([entry.shape[0] for entry in entries]), strict=True):
                _copy(entry, piece)
    return tensors


def _copy(entry: Entry, out: torch.Tensor) -> None:
    """Fills `out` with the values of `entry`, a piece of rows at a time."""
    assert entry.dtype is not None
    rows = max(1, PIECE_BYTES * entry.shape[0] // max(1, out.numel() * entry.dtype.itemsize))
    for begin in range(0, entry.shape[0], rows):
        out[begin : begin + rows] = _open(entry.file)[entry.name][begin : begin + rows]


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_bytes: int = sys.maxsize) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` (or one tensor) with an index of them."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    save_file = optional("safetensors.torch").save_file
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
