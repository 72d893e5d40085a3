"""Checkpoints: safetensors for tensors, JSON for the rest, written atomically and verified when read.

A checkpoint is a directory `step-00000042` with `state.json` and one `.safetensors` file for each group of tensors.
`state.json` is written last and holds the size and SHA-256 of every other file and the SHA-256 of its own facts; the
directory gets its name only when all of it is on disk. So a checkpoint that exists is whole, and one that was damaged
later is refused, with the file and the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

STATE_FILE = "state.json"
FORMAT = 2
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Writes `run/step-<step>` atomically and removes all but the newest `keep` checkpoints.

    Args:
        run: directory of the run; made if it is missing.
        step: number of training steps done, 0 .. 99999999.
        tensors: groups of named tensors; group "model" becomes `model.safetensors`.
        state: JSON-able.

    Returns:
        The directory of the checkpoint.
    """
    from safetensors.torch import save_file

    target = run / f"step-{step:08d}"
    partial = run / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = {}
    for group, named in tensors.items():
        path = partial / f"{group}.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, path)
        _flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    path = partial / STATE_FILE
    record = {"format": FORMAT, "step": step, "files": files, "state": dict(state)}
    path.write_text(json.dumps(record | {"sha256": _digest_of_record(record)}, indent=1))
    _flush(path)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    _flush(run)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any], int]:
    """Reads and verifies a checkpoint directory: `(tensors, state, step)` as they were saved, on the CPU.

    Raises:
        CheckpointError: a file is missing, cut short, changed or not readable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((path / STATE_FILE).read_text())
    except OSError as error:
        raise CheckpointError(f"{path / STATE_FILE}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path / STATE_FILE}: not JSON ({error})") from error
    if not isinstance(record, dict) or not {"format", "step", "files", "state", "sha256"} <= record.keys():
        raise CheckpointError(f"{path / STATE_FILE}: not the state of a checkpoint")
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path / STATE_FILE}: expected format {FORMAT}, got {record['format']}")
    if record.pop("sha256") != _digest_of_record(record):
        raise CheckpointError(f"{path / STATE_FILE}: its contents changed after it was written (SHA-256 differs)")
    tensors = {}
    for name, expected in record["files"].items():
        file = path / name
        if not file.exists():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file}: expected {expected['bytes']} bytes, got {file.stat().st_size}")
        if _digest(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: its contents changed after it was written (SHA-256 differs)")
        try:
            tensors[file.stem] = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
    return tensors, record["state"], record["step"]


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("step-*") if _NAME.fullmatch(path.name))


def latest_checkpoint(path: Path) -> Path:
    """`path` itself where it is a checkpoint, else the newest one of the run `path`.

    Raises:
        CheckpointError: there is none.
    """
    if (path / STATE_FILE).exists():
        return path
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint here")
    return found[-1]


def _digest_of_record(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file (or the names in a directory) is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
