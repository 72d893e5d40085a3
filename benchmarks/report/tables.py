"""Kernel results as tables: the cases that stand for an op, how time grows with the text, and where ours is slower.

Which cases stand for an op is declared with the cases (`ops/cases.py`: headline and sweep) and lies in the results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from ..ops import OPS
from ..ops.cases import Headline
from .table import Table

# Variants that are ours in another form, or no op at all.
NOT_A_BASELINE = ("ours", "copy", "entropy, then segment", "F.linear, our entropy")
# What tables and plots call a baseline. In results its name is short, and ends in " compiled" under torch.compile.
BASELINES = {
    "reference": "PyTorch definition",
    "gather": "gather in PyTorch",
    "scatter_reduce": "torch.scatter_reduce",
    "segment_reduce": "torch.segment_reduce",
    "dense": "SDPA, dense mask",
    "flex": "FlexAttention",
    "embedding_bag": "F.embedding_bag",
    "6 embeddings": "six calls of F.embedding",
    "index_add": "index_add_ in PyTorch",
    "SparseAdam": "torch.optim.SparseAdam",
    "transformers": "Hugging Face transformers",
}
COMPILED = " compiled"
# A headline case is shown where it says, and in all places before.
PLACES: tuple[Headline, ...] = ("results", "readme", "top")
Row = dict[str, Any]
Case = dict[str, Row]  # the rows of one case in one environment, by variant


def cases(result: dict[str, Any], environment: str) -> Iterator[tuple[str, dict[str, Any], Case]]:
    """`(name, shapes, rows by variant)` of every case measured in `environment`."""
    found: dict[str, tuple[str, dict[str, Any], Case]] = {}
    for row in result["rows"]:
        if row["environment"] == environment:
            key = json.dumps([row["case"], row["shapes"]])
            found.setdefault(key, (row["case"], row["shapes"], {}))[2][row["variant"]] = row
    yield from found.values()


def environments(result: dict[str, Any]) -> list[str]:
    """Those that were measured, the first being the one that tables lead with."""
    return list(dict.fromkeys(row["environment"] for row in result["rows"]))


def headlines(result: dict[str, Any], environment: str) -> dict[str, Case]:
    """The cases that stand for the op, by name.

    Raises:
        ValueError: none of them was measured, or a case is to be shown in a place that does not exist.
    """
    found = {name: rows for name, _, rows in cases(result, environment) if rows["ours"]["headline"] is not None}
    for name, rows in found.items():
        if (place := rows["ours"]["headline"]) not in PLACES:
            expected = ", ".join(map(repr, PLACES))
            raise ValueError(f"{result['op']}: {name}: headline: expected one of {expected}, got {place!r}")
    if not found:
        raise ValueError(
            f"{result['op']}: its result has no headline case in the {environment} environment, so that tables would "
            "leave it out without a word: measure it without --case"
        )
    return found


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"


def best_baseline(rows: Case) -> Row | None:
    """The fastest variant that is not ours; None where the case has none."""
    others = [row for variant, row in rows.items() if variant not in NOT_A_BASELINE]
    return min(others, key=lambda row: row["seconds"], default=None)


def baseline_name(variant: str) -> str:
    """A variant of a result as a reader of the pages knows it; what is no baseline keeps its name."""
    name = variant.removesuffix(COMPILED)
    return BASELINES.get(name, name) + (", torch.compile" if variant.endswith(COMPILED) else "")


def speedup(rows: Case, baseline: Row) -> float:
    """Time of the baseline over ours: below 1 ours is slower."""
    return baseline["seconds"] / rows["ours"]["seconds"]


def kernel_table(kernels: dict[str, dict[str, Any]]) -> Table:
    """The headline cases of every op on one device."""
    lines: list[tuple[str, ...]] = []
    for op in OPS:
        if op not in kernels:
            lines.append((f"`{op}`", "", "not measured", "", "", "", ""))
            continue
        found = [headlines(kernels[op], where) for where in environments(kernels[op])]
        for name, rows in found[0].items():
            ours, best = rows["ours"], best_baseline(rows)
            first, *others = (f"{each[name]['ours']['fraction_of_copy']:.0%}" for each in found if name in each)
            share = f"{first} ({', '.join(others)})" if others else first
            rest = ("", "", "")
            if best is not None:
                memory = f"{_megabytes(ours['peak_bytes'])} against {_megabytes(best['peak_bytes'])}"
                rest = (baseline_name(best["variant"]), f"{speedup(rows, best):.1f}x", memory)
            lines.append((f"`{op}`", name, _milliseconds(ours["seconds"]), share, *rest))
    return Table("kernels", ("op", "case", "time", "of copy", "baseline", "speed-up", "memory"), lines)


def legend(kernels: dict[str, dict[str, Any]]) -> str:
    """What was measured on which machine, and how to read `kernel_table`."""
    result = next(iter(kernels.values()))
    text = (
        f"{device_line(kernels)} Medians. The baseline is the fastest other implementation that was measured, and "
        "the speed-up is its time over ours: below 1 ours is slower. The PyTorch definition is that of "
        "`blt_kernels/reference/`. "
        '"of copy" is the speed of a copy of the bytes that the op must move, measured in the same run'
    )
    if len(environments(result)) > 1:
        text += ", with bound threads and recycled memory; the share in brackets is that of the default environment"
    return text + ". Memory is the peak beside the inputs."


def device_line(kernels: dict[str, dict[str, Any]]) -> str:
    result = next(iter(kernels.values()))
    return f"**{result['device']}** ({result['dtype']}, torch {result['torch']}, {result['date']})."


def short_table(kernels: dict[str, dict[str, Any]]) -> Table:
    """The headline cases that README.md shows."""
    lines = [
        (f"`{op}`, {name}", baseline_name(best["variant"]), f"{speedup(rows, best):.1f}x")
        for op, name, rows, best in shown_in(kernels, "readme")
    ]
    return Table("kernels", ("op, case", "baseline", "speed-up"), lines)


def step_line(kernels: dict[str, dict[str, Any]]) -> list[str]:
    """How long an update of hash tables takes beside a step of SparseAdam, a sentence; nothing if not measured."""
    if (result := kernels.get("rowwise_adagrad_update")) is None:
        return []
    rows = headlines(result, environments(result)[0])["update"]
    ours, adam, shapes = rows["ours"], rows["SparseAdam"], rows["ours"]["shapes"]
    return [
        f"A step of a table of {shapes['R']:,} rows of {shapes['D']} ({result['dtype']}), of which the gradient lists "
        f"{shapes['rows']:,}, takes {_milliseconds(ours['seconds'])} by `rowwise_adagrad_update` and "
        f"{_milliseconds(adam['seconds'])} by {baseline_name('SparseAdam')}: {speedup(rows, adam):.0f} times as long. "
        f"The state is {_megabytes(4 * shapes['R'])} in place of {_megabytes(2 * 4 * shapes['R'] * shapes['D'])}."
    ]


def shown_in(kernels: dict[str, dict[str, Any]], place: Headline) -> Iterator[tuple[str, str, Case, Row]]:
    """`(op, name, rows, best baseline)` of the headline cases that are shown in `place`."""
    for op, result in kernels.items():
        for name, rows in headlines(result, environments(result)[0]).items():
            best = best_baseline(rows)
            if best is not None and rows["ours"]["headline"] in PLACES[PLACES.index(place) :]:
                yield op, name, rows, best


def slower_table(kernels: dict[str, dict[str, Any]]) -> Table:
    """The negative results: every measured case in which something else was faster than ours."""
    environment = environments(next(iter(kernels.values())))[0]
    lines, total, clear = [], 0, 0
    for op, result in kernels.items():
        for name, shapes, rows in cases(result, environment):
            ours, best = rows["ours"], best_baseline(rows)
            if best is None:
                continue
            total += 1
            if speedup(rows, best) < 1:
                apart = best["quartiles"][1] < ours["quartiles"][0]
                clear += apart
                inside = ", ".join(f"{key} {value}" for key, value in shapes.items())
                ratio = f"{speedup(rows, best):.2f}x"
                baseline = baseline_name(best["variant"])
                lines.append((f"`{op}`", name, inside, baseline, ratio, "yes" if apart else "no"))
    title = (
        f"Of {total} measured cases, ours is slower than the best baseline in {len(lines)}, "
        f"and in {clear} of them beyond the quartiles of both."
    )
    return Table(title, ("op", "case", "shapes", "baseline", "speed-up", "beyond the quartiles"), lines)


def growth(result: dict[str, Any], environment: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """`{case: {variant: [(N, seconds)]}}` over the sweep of sizes N.

    Raises:
        ValueError: no case of the sweep was measured.
    """
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, _, rows in cases(result, environment):
        for variant, row in rows.items():
            if row["sweep"] is not None:
                curves.setdefault(name, {}).setdefault(variant, []).append((row["sweep"], row["seconds"]))
    if not curves:
        raise ValueError(f"{result['op']}: its result has no case of the sweep over sizes: measure it without --case")
    for variants in curves.values():
        for points in variants.values():
            points.sort()
    return curves


def exponent(points: list[tuple[int, float]]) -> float:
    """x of time ~ N^x between the two largest sizes, where fixed costs no longer count."""
    (n0, t0), (n1, t1) = points[-2:]
    return math.log(t1 / t0) / math.log(n1 / n0)


def growth_table(kernels: dict[str, dict[str, Any]]) -> Table:
    """How time grows, from the second largest to the largest size measured."""
    lines = []
    for op, result in kernels.items():
        for name, variants in growth(result, environments(result)[0]).items():
            others = {v: p for v, p in variants.items() if v not in NOT_A_BASELINE and len(p) == len(variants["ours"])}
            ours = variants["ours"]
            if len(ours) < 2 or not others:
                continue
            best = min(others, key=lambda variant: others[variant][-1][1])
            sizes = f"{ours[-2][0]} to {ours[-1][0]}"
            theirs = f"N^{exponent(others[best]):.2f} ({baseline_name(best)})"
            lines.append((f"`{op}`", name, sizes, f"N^{exponent(ours):.2f}", theirs))
    return Table("How time grows with the size", ("op", "case", "N", "ours", "baseline"), lines)
