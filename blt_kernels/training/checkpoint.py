"""Checkpoints: safetensors for tensors, JSON for the rest, written atomically and verified when read.

A checkpoint is a directory `step-00000042` with `state.json` and one `.safetensors` file for each group of tensors.
`state.json` is written last and holds the size and SHA-256 of every other file and the SHA-256 of its own facts; the
directory gets its name only when all of it is on disk. So a checkpoint that exists is whole, and one that was damaged
later is refused, with the file and the reason.

Why this module, where libraries write tensors: safetensors writes one file and knows no directories, and
torch.distributed.checkpoint writes the files of many ranks (see sharded_files). Neither checks what it reads, nor makes
several files appear at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._files import flush, naming
from .._optional import optional
from .ranks import from_first, is_first, world_size

STATE_FILE = "state.json"
FORMAT = 2
KEPT = 2  # checkpoints of a run: should the newest be damaged, the one before it is left
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
) -> Path:
    """Writes `run/step-<step>` atomically and removes all but the newest two checkpoints. All ranks call it together.

    Args:
        run: directory of the run; made if it is missing.
        step: number of training steps done, 0 .. 99999999.
        tensors: groups of named tensors; group "model" becomes `model.safetensors`. The tensors of a group lie on many
            ranks as DTensors, or are equal on all.
        state: JSON-able; that of rank 0 is saved.

    Returns:
        The directory of the checkpoint.

    Raises:
        CheckpointError: a file cannot be written, as on a full disk. Nothing of the new checkpoint is left then.
    """
    target = run / f"step-{step:08d}"
    partial = run / f".{target.name}.partial"
    try:
        with naming(partial):
            from_first(lambda: _begin(run, partial))
            paths = [_write_tensors(partial / f"{group}.safetensors", named) for group, named in tensors.items()]
            from_first(lambda: _finish(partial, target, step, paths, dict(state)))
    except BaseException as error:
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from error
        raise
    return target


def _begin(run: Path, partial: Path) -> None:
    remove_partial(run)
    partial.mkdir(parents=True)


def _write_tensors(path: Path, named: Mapping[str, torch.Tensor]) -> Path:
    """Writes a file; where its tensors lie on many ranks, together with them."""
    if any(hasattr(tensor, "device_mesh") for tensor in named.values()):
        from .sharded_files import write_tensors  # it takes seconds to import

        write_tensors(path, named)
    else:
        from_first(lambda: _save_tensors(path, named))
    return path


def _finish(partial: Path, target: Path, step: int, paths: list[Path], state: dict[str, Any]) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in paths}
    record = {"format": FORMAT, "step": step, "files": files, "state": state}
    path = partial / STATE_FILE
    path.write_text(json.dumps(record | {"sha256": _digest_of_record(record)}, indent=1))
    for written in (*paths, path, partial):  # the directory last: it holds their names
        flush(written)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    flush(target.parent)
    for old in list_checkpoints(target.parent)[:-KEPT]:
        shutil.rmtree(old)


def remove_partial(run: Path) -> None:
    """Removes what a process that was killed while it wrote a checkpoint has left in `run`."""
    for partial in run.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(
    path: Path, *, groups: Sequence[str] | None = None, read: Callable[[Path], dict[str, torch.Tensor]] | None = None
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any], int]:
    """Reads and verifies a checkpoint directory: `(tensors, state, step)` as they were saved, on the CPU.

    Args:
        groups: the groups of tensors to read; None for all.
        read: from a file to its tensors, where they are not wanted whole.

    Raises:
        CheckpointError: a file is missing, cut short, changed or not readable.
    """
    read = read or optional("safetensors.torch").load_file
    record = _read_record(path)
    files = {name: facts for name, facts in record["files"].items() if groups is None or Path(name).stem in groups}
    with _naming_the_one_before(path):
        from_first(lambda: _verify(path, files))
        tensors = {}
        for name in files:
            file = path / name
            # What is wrong with a file has been found by now; on many ranks a RuntimeError is about another rank.
            with reading(file, passing=(RuntimeError,) if world_size() > 1 else ()):
                tensors[file.stem] = read(file)
    return tensors, record["state"], record["step"]


def _verify(path: Path, files: dict[str, Any]) -> None:
    for name, expected in files.items():
        file = path / name
        with reading(file):
            if not file.exists():
                raise CheckpointError(f"{file}: missing")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file}: expected {expected['bytes']} bytes, got {file.stat().st_size}")
            if _digest(file) != expected["sha256"]:
                raise CheckpointError(f"{file}: its contents changed after it was written (SHA-256 differs)")


def load_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint directory, verified, without its tensors.

    Raises:
        CheckpointError: `state.json` is missing, changed or not readable.
    """
    return _read_record(path)["state"]


@contextlib.contextmanager
def reading(file: Path, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns whatever the contents of `file` cause in the block into a CheckpointError that names the file.

    The digests show that a file is as it was written. But another version or another program may have written it, with
    fields that are missing, have other types or do not fit each other, and such fields cause errors of every type.
    Errors of the types `passing` are about something else and stay what they are.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise CheckpointError(f"{file}: does not fit in memory") from error
    except Exception as error:
        if isinstance(error, (CheckpointError, *passing)):
            raise
        raise CheckpointError(f"{file}: cannot be used ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def _naming_the_one_before(path: Path) -> Iterator[None]:
    """Adds to a CheckpointError about the checkpoint `path` which other one of the run could be used in its place."""
    try:
        yield
    except CheckpointError as error:
        older = [other for other in list_checkpoints(path.parent) if other.name < path.name]
        if not older:
            raise
        raise CheckpointError(f"{error}; the checkpoint before it is {older[-1]}") from error


def _read_record(path: Path) -> dict[str, Any]:
    """The facts of `state.json`, verified."""
    file = path / STATE_FILE
    with _naming_the_one_before(path), reading(file):
        try:
            record = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not JSON ({error})") from error
        kinds = {"format": int, "step": int, "files": dict, "state": dict, "sha256": str}
        if not isinstance(record, dict) or any(not isinstance(record.get(key), kind) for key, kind in kinds.items()):
            raise CheckpointError(f"{file}: not the state of a checkpoint")
        if record["format"] != FORMAT:
            raise CheckpointError(f"{file}: expected format {FORMAT}, got {record['format']}: made by another version")
        if record.pop("sha256") != _digest_of_record(record):
            raise CheckpointError(f"{file}: its contents changed after it was written (SHA-256 differs)")
    return record


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
    if not path.is_dir():
        reason = "this is a file" if path.exists() else "there is no such directory"
        raise CheckpointError(f"{path}: no checkpoint here: {reason}")
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint here")
    return found[-1]


def _save_tensors(path: Path, named: Mapping[str, torch.Tensor]) -> None:
    try:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in named.items()}
        optional("safetensors.torch").save_file(contiguous, path)
    except optional("safetensors").SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from error
    flush(path)


def _digest_of_record(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
