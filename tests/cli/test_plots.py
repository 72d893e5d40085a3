"""The loss curve: what is drawn where, from rows or from a file."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blt_kernels._optional import new_figure
from blt_kernels.cli import plots
from blt_kernels.cli.plots import save_loss_curve

BASELINES = {"gzip -9": 1.756, "gzip -9 given training text (last 32 KiB)": 1.755, "cost: $x$ and $y$": 1.43}


def metrics(rows: int) -> list[dict[str, Any]]:
    result = []
    for i in range(1, rows + 1):
        row = {"step": i, "bytes": i * 30_000, "seconds": i * 0.5, "bits_per_byte": 8 * i**-0.3, "loss": 1.0}
        result.append(row | ({"held_out_bits_per_byte": 8.1 * i**-0.3} if i % 10 == 0 else {}))
    return result


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.size == (1440, 600)
        return np.asarray(image.convert("RGB"), np.int64)


def blue(image: np.ndarray) -> int:
    return int((image[..., 2] - image[..., 0] > 40).sum())


def orange(image: np.ndarray) -> int:
    return int((image[..., 0] - image[..., 2] > 40).sum())


@pytest.mark.parametrize("rows", [1, 2, 9, 300])
def test_training_and_held_out_are_drawn(
    rows: int, tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    path = tmp_path / "loss.png"
    save_loss_curve(path, metrics(rows))
    image = pixels(path)
    assert blue(image) > 50
    assert (orange(image) > 50) == (rows >= 10)
    held_out = [{key: row[key] for key in row if key != "bits_per_byte"} for row in metrics(rows) if rows >= 10]
    if held_out:
        save_loss_curve(path, [row for row in held_out if "held_out_bits_per_byte" in row])
        assert blue(pixels(path)) == 0 < orange(pixels(path))
    assert not recwarn.list


def test_baselines_are_lines_across_both_panels_and_names_in_a_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    figures = []
    monkeypatch.setattr(plots, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    save_loss_curve(tmp_path / "loss.png", metrics(50), baselines=BASELINES)
    panels = figures[0].axes
    for axes in panels:
        levels = {line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1}
        assert levels == set(BASELINES.values())
    curves, names = ([text.get_text() for text in axes.get_legend().get_texts()] for axes in panels)
    assert curves == ["training", "held out"]
    # In the order of the lines, and taken literally.
    assert names == [f"{bits:.2f}  {name}" for name, bits in sorted(BASELINES.items(), key=lambda mark: -mark[1])]
    colours = [line.get_color() for line in panels[0].lines if line.get_label() in names]
    assert len({tuple(colour) for colour in colours}) == len(BASELINES)
    assert not recwarn.list


def test_a_file_gives_the_same_picture_as_its_rows(tmp_path: Path) -> None:
    log, from_file, from_rows = tmp_path / "metrics.jsonl", tmp_path / "file.png", tmp_path / "rows.png"
    lines = [json.dumps(row) for row in metrics(20)]
    log.write_text("\n".join(lines) + "\n\n" + '{"step": 21, "byt')  # training is writing just now
    save_loss_curve(from_file, log, baselines=BASELINES)
    save_loss_curve(from_rows, iter(metrics(20)), baselines=BASELINES)
    assert from_file.read_bytes() == from_rows.read_bytes()
    log.write_text("\n".join([lines[0], "{broken", lines[1]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        save_loss_curve(from_file, log)
    log.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: expected a JSON object, got \[1\]"):
        save_loss_curve(from_file, log)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "loss.png"
    (tmp_path / "empty.jsonl").touch()
    for empty in ([], tmp_path / "empty.jsonl"):
        with pytest.raises(ValueError, match="metrics: expected at least one row, got none"):
            save_loss_curve(path, empty)
    for key in ("bytes", "seconds", "bits_per_byte"):
        row = {name: value for name, value in metrics(1)[0].items() if name != key}
        with pytest.raises(ValueError, match="metrics: expected rows with bytes, seconds and bits_per_byte"):
            save_loss_curve(path, [*metrics(2), row])
    for bits in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(ValueError, match="expected positive and finite bits per byte"):
            save_loss_curve(path, [*metrics(2), metrics(1)[0] | {"bits_per_byte": bits}])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib is missing: pip install 'blt_kernels\[train\]'"):
        save_loss_curve(path, metrics(2))
    assert not path.exists()


def test_units() -> None:
    assert plots._unit("bytes", 0) == ("bytes seen (B)", 1)
    assert plots._unit("bytes", 1.9e6) == ("bytes seen (kB)", 1e3)
    assert plots._unit("bytes", 2e6) == ("bytes seen (MB)", 1e6)
    assert plots._unit("seconds", 119) == ("training time (seconds)", 1)
    assert plots._unit("seconds", 10_000) == ("training time (hours)", 3600)


def test_smoothing_is_a_mean_that_follows_the_fall() -> None:
    np.testing.assert_allclose(plots._smooth(np.full(200, 3.0)), 3.0, rtol=1e-12)
    random = np.random.default_rng(0)
    noisy = 2 + 0.1 * random.standard_normal(5000)
    smooth = plots._smooth(noisy)
    assert np.std(smooth[1000:]) < 0.2 * np.std(noisy)
    assert abs(smooth[1000:].mean() - 2) < 0.01
    falling = 8 * np.arange(1, 1001) ** -0.3
    assert np.all(np.abs(plots._smooth(falling) / falling - 1) < 0.1)
