"""Checkpoints are whole or refused, with the file and the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

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
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
    assert latest_checkpoint(tmp_path).name == "step-00000010"
    assert latest_checkpoint(tmp_path / "step-00000009").name == "step-00000009"


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


def test_a_changed_state_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, TENSORS, {"bytes_seen": 60})
    state = path / STATE_FILE
    state.write_text(state.read_text().replace('"bytes_seen": 60', '"bytes_seen": 40'))
    with pytest.raises(CheckpointError, match=r"state\.json: its contents changed"):
        load_checkpoint(path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        latest_checkpoint(tmp_path)
