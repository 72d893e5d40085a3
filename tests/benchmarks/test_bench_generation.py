"""The benchmark of generation: it measures each loop, and writes what the table shows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import generation


def test_each_loop_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shapes", "width 8", "--prompts", "40", "--rows", "1", "2", "--rounds", "2", "--bytes", "3"]
    generation.main([*options, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*/generation.json")
    result = json.loads(path.read_text())
    assert [row["rows"] for row in result["rows"]] == [1, 2]
    alone, together = result["rows"]
    loops = {"cached", "uncached"}
    assert loops <= alone.keys() and loops <= together.keys() and "transformers" not in together
    assert ("transformers" in alone) == (importlib.util.find_spec("transformers") is not None)
    for row in result["rows"]:
        assert all(row[name]["quartiles"][0] > 0 for name in loops & row.keys())
        assert 0 <= row["patches_per_step"] <= row["rows"]
    assert "width 8" in capsys.readouterr().out
