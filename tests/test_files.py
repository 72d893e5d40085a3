"""Files appear whole or not at all, and an error names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blt_kernels._files import atomic_path, naming


def test_a_file_appears_whole_or_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), atomic_path(path) as partial:
            partial.write_text("half")
            raise error
        assert not list(tmp_path.iterdir())
    with atomic_path(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with atomic_path(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    with atomic_path("/dev/null") as partial:
        partial.write_text("gone")
    assert Path("/dev/null").is_char_device()
    os.mkfifo(tmp_path / "pipe")
    with atomic_path(tmp_path / "pipe") as partial:
        assert partial == tmp_path / "pipe"


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "file", tmp_path):
        with pytest.raises(OSError) as caught, atomic_path(path) as partial:
            partial.write_text("x")
        assert caught.value.filename == str(path)
    with pytest.raises(OSError) as caught, naming(tmp_path):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(OSError) as caught, atomic_path("/dev/full") as partial:
        partial.write_text("x")
    assert caught.value.filename == "/dev/full"
