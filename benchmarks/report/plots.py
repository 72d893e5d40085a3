"""Plots of kernel results. Each carries the digest of what it shows, so that a check needs no pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blt_kernels._optional import new_figure, optional

from .tables import NOT_A_BASELINE, baseline_name, environments, growth, headlines, speedup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = "bytes of text, or rows that a gradient lists"  # what is swept
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"linewidth": 2.5, "color": "black"},
    "copy": {"linestyle": ":", "color": "gray"},
}


def plots(kernels: dict[str, dict[str, Any]], jobs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What each plot of a device shows, as plain data, by name.

    Args:
        kernels: kernel results by op.
        jobs: finished FLOP-matched jobs by scale.
    """
    made: dict[str, Any] = {}
    if kernels:
        leading = environments(next(iter(kernels.values())))[0]
        speedups, rates, curves = {}, {}, {}
        for op, result in kernels.items():
            for name, rows in headlines(result, leading).items():
                ours = rows["ours"]
                speedups[f"{op}, {name}"] = {
                    baseline_name(variant): speedup(rows, row)
                    for variant, row in rows.items()
                    if variant not in NOT_A_BASELINE
                }
                rates[f"{op}, {name}"] = {"ours": ours["gb_per_second"], "copy": rows["copy"]["gb_per_second"]}
            for name, variants in growth(result, leading).items():
                lines = {baseline_name(variant): points for variant, points in variants.items() if len(points) > 1}
                if "ours" in lines:
                    curves[f"{op}, {name}"] = lines
        made = {"speedup": speedups, "roofline": rates} | ({"time_against_n": curves} if curves else {})
    for scale, results in jobs.items():
        made |= {f"quality_{scale}_{size}": data for size, data in _quality(results).items()}
    return made


def _quality(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By FLOP class: the curves of every run, and whether they are only a smoke test."""
    made: dict[str, Any] = {}
    for row in rows:
        if row["kind"] in ("main", "ablation"):
            size = made.setdefault(row["size"], {"smoke": row["smoke"], "runs": []})
            points = [
                (point["training_flops"], point["seconds"], point["valid_bits_per_byte"]) for point in row["curve"]
            ]
            size["runs"].append(
                {"model": row["model"]["name"], "flops_per_byte": row["flops"]["inclusive"], "points": points}
            )
    return made


def draw(name: str, data: dict[str, Any], path: Path) -> None:
    """Draws one of `plots` as a PNG that carries the digest of its data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing: dict[str, Callable[[Any], Figure]] = {
        "speedup": _draw_speedup,
        "roofline": _draw_rates,
        "time_against_n": _draw_growth,
    }
    figure = drawing.get(name, _draw_quality)(data)
    figure.savefig(path, dpi=100, metadata={"Source": digest(data)})


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def drawn_digest(path: Path) -> str | None:
    """The digest in a plot that `draw` has made; None where there is no such plot."""
    if not path.exists():
        return None
    image = optional("PIL.Image").open(path)
    return image.info.get("Source")


def _draw_speedup(data: dict[str, dict[str, float]]) -> Figure:
    rows = [(case, variant, value) for case, variants in data.items() for variant, value in variants.items()]
    figure = new_figure(11, 0.24 * len(rows) + 1.2)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    colors = {case: f"C{i % 10}" for i, case in enumerate(data)}
    # A bar goes from 1 to its value: to the right where ours is faster, to the left where it is not.
    widths = [value - 1 for _, _, value in rows]
    axes.barh(range(len(rows)), widths, left=1, color=[colors[case] for case, _, _ in rows])
    axes.set_yticks(range(len(rows)), [f"{case}: {variant}" for case, variant, _ in rows], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which(lambda value, position: f"{value:g}x" if f"{value:g}"[0] in "125" else "")
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("speed-up of blt_kernels over each baseline (log scale; left of the line ours is slower)")
    return figure


def _draw_rates(data: dict[str, dict[str, float]]) -> Figure:
    figure = new_figure(11, 0.4 * len(data) + 1.2)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for offset, which in ((-0.2, "ours"), (0.2, "copy")):
        heights = [values[which] for values in data.values()]
        axes.barh([i + offset for i in range(len(data))], heights, height=0.38, label=which)
    axes.set_yticks(range(len(data)), list(data), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of the bytes that the op must move, beside a copy of as many bytes in the same run")
    axes.legend()
    return figure


def _draw_growth(data: dict[str, dict[str, list[tuple[int, float]]]]) -> Figure:
    columns = 3
    rows = -(-len(data) // columns)
    figure = new_figure(5 * columns, 3.2 * rows)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, variants) in zip(grid.flat, data.items(), strict=False):
        for variant, points in variants.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=variant, **STYLES.get(variant, {}))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(SIZE)
        axes.set_ylabel("seconds")
        axes.legend(fontsize=6)
    for axes in list(grid.flat)[len(data) :]:
        axes.set_visible(False)
    return figure


def _draw_quality(data: dict[str, Any]) -> Figure:
    figure = new_figure(15, 4.5)
    figure.set_layout_engine("constrained")
    if data["smoke"]:
        figure.suptitle("smoke test: too short to say which model is better", color="#c2410c")
    by_flops, by_time, by_inference = figure.subplots(1, 3, sharey=True)
    colors = {run["model"]: f"C{i}" for i, run in enumerate({run["model"]: run for run in data["runs"]}.values())}
    labelled = set()
    for run in data["runs"]:
        model = run["model"]
        style = {"color": colors[model], "marker": ".", "linewidth": 1}
        label = None if model in labelled else model
        labelled.add(model)
        flops, seconds, bits = zip(*run["points"], strict=True)
        by_flops.plot(flops, bits, label=label, **style)
        by_time.plot(seconds, bits, **style)
        by_inference.plot(run["flops_per_byte"], bits[-1], color=colors[model], marker="o")
    by_flops.set_ylabel("bits per byte, validation text")
    by_flops.set_xlabel("training FLOPs")
    by_time.set_xlabel("seconds of training")
    by_inference.set_xlabel("inference FLOPs per byte (inclusive), at the end")
    by_inference.locator_params(axis="x", nbins=4)
    by_flops.legend(fontsize=7)
    return figure
