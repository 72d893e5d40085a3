"""The loss curve of a training run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._checks import fail_value
from .._optional import new_figure, optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAINING, _HELD_OUT = "#2563a8", "#c2410c"
_Floats = npt.NDArray[np.float64]


def save_loss_curve(
    path: str | os.PathLike[str],
    metrics: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    *,
    baselines: Mapping[str, float] | None = None,
) -> None:
    """Draws bits per byte against bytes seen and against time, as a PNG of 1440 x 600 pixels.

    Args:
        metrics: the rows that training wrote, or the path of its metrics.jsonl (a last line that is still being
            written is passed over). Keys: "bytes" and "seconds" so far, and "bits_per_byte" of training, or
            "held_out_bits_per_byte", or both; others are ignored.
        baselines: bits per byte to draw as horizontal lines, by name; a legend beside the panels lists them.

    Raises:
        ValueError: there is no row, a row lacks a key, a line is not JSON, or a value is not positive and finite.
    """
    rows = list(_read(Path(metrics)) if isinstance(metrics, (str, os.PathLike)) else metrics)
    for row in rows:
        if not ("bytes" in row and "seconds" in row and ("bits_per_byte" in row or "held_out_bits_per_byte" in row)):
            raise fail_value("save_loss_curve", "metrics", "rows with bytes, seconds and bits_per_byte", dict(row))
    if not rows:
        raise fail_value("save_loss_curve", "metrics", "at least one row", "none")
    marks = {name: float(bits) for name, bits in (baselines or {}).items()}

    figure = new_figure(12, 5)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    by_bytes, by_time = figure.subplots(1, 2, sharey=True)
    _draw(by_bytes, rows, "bytes", marks)
    _draw(by_time, rows, "seconds", marks)
    by_bytes.set_ylabel("bits per byte")
    handles, labels = by_bytes.get_legend_handles_labels()
    curves = len(labels) - len(marks)
    by_bytes.legend(handles[:curves], labels[:curves], loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    if marks:
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False, "fontsize": 9}
        for text in by_time.legend(handles[curves:], labels[curves:], **beside).get_texts():
            text.set_parse_math(False)
    figure.savefig(path, dpi=120, format="png")


def _read(path: Path) -> Iterable[Mapping[str, Any]]:
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline yet
                return
            raise ValueError(f"save_loss_curve: {path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"save_loss_curve: {path}, line {number}: expected a JSON object, got {line[:80]}")
        yield row


def _draw(axes: Axes, rows: list[Mapping[str, Any]], key: str, marks: Mapping[str, float]) -> None:
    unit, scale = _unit(key, max(row[key] for row in rows))
    train_x, train_y = _column(rows, key, "bits_per_byte")
    held_x, held_y = _column(rows, key, "held_out_bits_per_byte")
    if len(train_x):
        axes.plot(train_x / scale, train_y, color=_TRAINING, alpha=0.25, linewidth=1)
        marker = "o" if len(train_x) == 1 else None
        axes.plot(train_x / scale, _smooth(train_y), color=_TRAINING, linewidth=2, marker=marker, label="training")
    if len(held_x):
        axes.plot(held_x / scale, held_y, "o-", color=_HELD_OUT, markersize=5, linewidth=1, label="held out")
    # The names stand in the legend in the order of the lines, and both go from dark to light.
    colours = optional("matplotlib").colormaps["viridis"](np.linspace(0.9, 0, len(marks)))
    for (name, bits), colour in zip(sorted(marks.items(), key=lambda mark: -mark[1]), colours, strict=True):
        axes.axhline(bits, color=colour, linewidth=1.5, linestyle=(0, (2, 2)), zorder=1, label=f"{bits:.2f}  {name}")
    # The drop from 8 bits and the last hundredths both matter: a logarithmic axis, with plain numbers.
    ticker = optional("matplotlib.ticker")
    every = np.concatenate((train_y, held_y, list(marks.values())))
    low, high = every.min(), every.max()
    if not 0 < low <= high < np.inf:
        raise fail_value("save_loss_curve", "metrics", "positive and finite bits per byte", f"{low} to {high}")
    axes.set_yscale("log")
    axes.set_ylim(min(low / 1.05, high / 1.5), high * 1.05)  # two ticks at least
    axes.yaxis.set_major_locator(ticker.FixedLocator([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 7, 8]))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlim(left=0)
    axes.set_xlabel(unit)
    axes.grid(axis="both", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _unit(key: str, largest: float) -> tuple[str, float]:
    """The axis' label and its unit in terms of the key's own."""
    if key == "bytes":
        return next(
            (f"bytes seen ({name})", scale)
            for name, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
            if largest >= 2 * scale or scale == 1
        )
    return next(
        (f"training time ({name})", scale)
        for name, scale in (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
        if largest >= 2 * scale or scale == 1
    )


def _column(rows: list[Mapping[str, Any]], x: str, y: str) -> tuple[_Floats, _Floats]:
    points = [(row[x], row[y]) for row in rows if y in row]
    return tuple(np.array(points, np.float64).reshape(-1, 2).T)  # type: ignore[return-value]


def _smooth(values: _Floats) -> _Floats:
    """Exponential moving average over about a fiftieth of the run, and less where it begins and falls fast."""
    result = np.empty_like(values)
    average = 0.0
    for i, value in enumerate(values):
        average += (value - average) / max(1.0, min(len(values) / 50, i / 5))
        result[i] = average
    return result
