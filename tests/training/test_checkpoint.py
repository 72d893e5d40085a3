"""Checkpoints are whole or refused, with the file and the reason."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from blt_kernels.training import checkpoint
from blt_kernels.training.checkpoint import (
    STATE_FILE,
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

TENSORS = {"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16)}, "optimizer": {}}


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, TENSORS, {"note": [1, None, "x"]})
    tensors, state, step = load_checkpoint(path)
    assert step == 7 and state == {"note": [1, None, "x"]}
    assert tensors["optimizer"] == {}
    for name, tensor in TENSORS["model"].items():
        assert tensors["model"][name].dtype == tensor.dtype
        assert torch.equal(tensors["model"][name], tensor)


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 10, 9):
        save_checkpoint(tmp_path, step, TENSORS, {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
    assert latest_checkpoint(tmp_path).name == "step-00000010"
    assert latest_checkpoint(tmp_path / "step-00000009").name == "step-00000009"


def test_damage_names_the_checkpoint_that_can_be_used_instead(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, TENSORS, {})
    (tmp_path / "step-00000002" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing; the checkpoint before it is .*00001$"):
        load_checkpoint(latest_checkpoint(tmp_path))
    (tmp_path / "step-00000001" / STATE_FILE).write_text("")
    with pytest.raises(CheckpointError, match=r"not JSON \(.*\)$"):
        load_checkpoint(tmp_path / "step-00000001")


def test_files_and_their_names_are_on_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    flush, rename = checkpoint.flush, os.rename
    monkeypatch.setattr(checkpoint, "flush", lambda path: (done.append(path.name), flush(path)))
    monkeypatch.setattr(os, "rename", lambda *names: (done.append("rename"), rename(*names)))
    save_checkpoint(tmp_path, 1, TENSORS, {})
    before = done[: done.index("rename")]
    assert {f"{group}.safetensors" for group in TENSORS} | {STATE_FILE} <= set(before)
    assert before[-1] == ".step-00000001.partial" and done[-2:] == ["rename", tmp_path.name]


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, {})

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, TENSORS, {})
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    load_checkpoint(latest_checkpoint(tmp_path))
    save_checkpoint(tmp_path, 2, TENSORS, {})
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _rewrite(path: Path, **changes: Any) -> None:
    """Other facts in `state.json`, with the right digest: as another version, or other hands, would write them."""
    record = json.loads((path / STATE_FILE).read_text()) | changes
    del record["sha256"]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (path / STATE_FILE).write_text(json.dumps(record | {"sha256": digest}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "model.safetensors").unlink(), r"model\.safetensors: missing"),
        (
            lambda path: (path / "model.safetensors").write_bytes(b"short"),
            r"model\.safetensors: expected \d+ bytes, got 5",
        ),
        (lambda path: _flip(path / "model.safetensors"), r"model\.safetensors: its contents changed"),
        (lambda path: (path / STATE_FILE).unlink(), r"state\.json: cannot be read"),
        (lambda path: (path / STATE_FILE).write_text("{"), r"state\.json: not JSON"),
        (lambda path: (path / STATE_FILE).write_text("[]"), r"state\.json: not the state of a checkpoint"),
        (lambda path: (path / STATE_FILE).write_text("[" * 100_000), r"state\.json: not JSON"),
        (lambda path: (path / STATE_FILE).write_bytes(b"\xff\xfe"), r"state\.json: not JSON"),
        (lambda path: _replace_by_directory(path / STATE_FILE), r"state\.json: cannot be read"),
        (lambda path: _replace_by_directory(path / "model.safetensors"), r"model\.safetensors: expected \d+ bytes"),
    ],
)
def test_damage_is_refused_with_file_and_reason(tmp_path: Path, damage, reason: str) -> None:
    path = save_checkpoint(tmp_path, 3, TENSORS, {})
    damage(path)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, TENSORS, {})
    record = json.loads((path / STATE_FILE).read_text())
    (path / STATE_FILE).write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(CheckpointError, match="expected format 2, got 99"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"files": {"model.safetensors": 7}}, r"model\.safetensors: cannot be used \(TypeError"),
        ({"files": {"model.safetensors": {}}}, r"model\.safetensors: cannot be used \(KeyError"),
        ({"files": []}, r"state\.json: not the state of a checkpoint"),
        ({"state": None}, r"state\.json: not the state of a checkpoint"),
        ({"step": "3"}, r"state\.json: not the state of a checkpoint"),
        ({"format": "2"}, r"state\.json: not the state of a checkpoint"),
    ],
)
def test_wrong_types_are_refused_with_file_and_reason(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = save_checkpoint(tmp_path, 3, TENSORS, {})
    _rewrite(path, **changes)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, TENSORS, {})
    file = path / "model.safetensors"
    file.write_bytes(b"\xff" * 64)
    facts = {"bytes": 64, "sha256": hashlib.sha256(b"\xff" * 64).hexdigest()}
    _rewrite(path, files={file.name: facts})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be used \(SafetensorError"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint(run, 1, TENSORS, {})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(CheckpointError, match="step-00000002: cannot be written"):
            save_checkpoint(run, 2, {"model": {"a": torch.zeros(10_000)}}, {})
        with pytest.raises(CheckpointError, match="step-00000002: cannot be written"):
            save_checkpoint(run, 2, {}, {"note": "x" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in run.iterdir()] == ["step-00000001"]
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "run", 1, TENSORS, {})


def test_a_changed_state_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, TENSORS, {"bytes_seen": 60})
    state = path / STATE_FILE
    state.write_text(state.read_text().replace('"bytes_seen": 60', '"bytes_seen": 40'))
    with pytest.raises(CheckpointError, match=r"state\.json: its contents changed"):
        load_checkpoint(path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint here$"):
        latest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint here: there is no such directory"):
        latest_checkpoint(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no checkpoint here: this is a file"):
        latest_checkpoint(tmp_path / "file")
