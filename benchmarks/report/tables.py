"""Kernel results as tables: which cases stand for an op, how ours compares, how time grows, where ours loses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from ..ops.harness import OPS
from .table import Table

# Variants that are ours in another form, or no op at all.
NOT_A_BASELINE = ("ours", "copy", "entropy, then segment", "F.linear, our entropy")
# The cases that stand for an op in tables: their names, where they are not "forward" and "backward", and their shapes.
CENTRE_NAMES = {"hash_ngram_embedding": ("forward with base", "both, sparse gradient")}
COMMON = {"N": 16384, "D": 1024, "patches": "text 4.5"}
CENTRES: dict[str, dict[str, Any]] = {
    "segment_logits": {"N": 65536, "patches": "mean 4.5"},
    "linear_entropy": {"rows": 4096, "D": 768, "dtype": "of the document"},
    "patch_pool": COMMON,
    "patch_gather": COMMON,
    "encoder_cross_attention": {"N": 16384, "H": 16, "K": 2, "patches": "text 4.5"},
    "decoder_cross_attention": {"N": 16384, "H": 16, "K": 2, "patches": "text 4.5"},
    "hash_ngram_embedding": {"N": 16384, "D": 1024, "tokens": "text"},
}
GPU_BYTES = 1 << 19  # N on a GPU, where it moves a gigabyte; of the hash tables a few rows for each byte do
GPU_HASHED_BYTES = 1 << 16
Row = dict[str, Any]
Case = dict[str, Row]  # the rows of one case in one environment, by variant


def cases(document: dict[str, Any], environment: str) -> Iterator[tuple[str, dict[str, Any], Case]]:
    """`(name, shapes, rows by variant)` of every case measured in `environment`."""
    found: dict[str, tuple[str, dict[str, Any], Case]] = {}
    for row in document["rows"]:
        if row["environment"] == environment:
            key = json.dumps([row["case"], row["shapes"]])
            found.setdefault(key, (row["case"], row["shapes"], {}))[2][row["variant"]] = row
    yield from found.values()


def environments(document: dict[str, Any]) -> list[str]:
    """Those that were measured, the first being the one that tables lead with."""
    return list(dict.fromkeys(row["environment"] for row in document["rows"]))


def centre(document: dict[str, Any]) -> dict[str, Any]:
    """What the shapes of the cases hold that stand for the op on this device."""
    wanted = dict(CENTRES[document["op"]])
    if "dtype" in wanted:
        wanted["dtype"] = document["dtype"]
    if "cuda" in document and "N" in wanted:
        wanted["N"] = GPU_HASHED_BYTES if document["op"] == "hash_ngram_embedding" else GPU_BYTES
    return wanted


def centres(document: dict[str, Any], environment: str) -> Iterator[tuple[str, Case]]:
    """`(case, rows)` of the cases that stand for the op."""
    wanted = centre(document)
    for name, shapes, rows in cases(document, environment):
        fits = all(shapes.get(key) == value for key, value in wanted.items()) and shapes.get("B", 1) == 1
        if fits and name in CENTRE_NAMES.get(document["op"], ("forward", "backward")):
            yield name, rows


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"


def best_baseline(rows: Case) -> Row | None:
    others = [row for variant, row in rows.items() if variant not in NOT_A_BASELINE]
    return min(others, key=lambda row: row["seconds"], default=None)


def kernel_table(documents: dict[str, dict[str, Any]]) -> Table:
    """The ops of one device at the shapes that stand for them."""
    lines: list[tuple[str, ...]] = []
    for op in OPS:
        if op not in documents:
            lines.append((f"`{op}`", "", "not measured", "", "", "", ""))
            continue
        found = {where: dict(centres(documents[op], where)) for where in environments(documents[op])}
        leading = next(iter(found.values()))
        for name, rows in leading.items():
            ours, best = rows["ours"], best_baseline(rows)
            first, *others = (
                f"{each[name]['ours']['fraction_of_copy']:.0%}" for each in found.values() if name in each
            )
            share = f"{first} ({', '.join(others)})" if others else first
            rest = ("", "", "")
            if best is not None:
                memory = f"{_megabytes(ours['peak_bytes'])} against {_megabytes(best['peak_bytes'])}"
                rest = (best["variant"], f"{best['seconds'] / ours['seconds']:.1f}x", memory)
            lines.append((f"`{op}`", name, _milliseconds(ours["seconds"]), share, *rest))
    return Table("kernels", ("op", "case", "time", "of copy", "the best other way", "it takes", "memory"), lines)


def legend(documents: dict[str, dict[str, Any]]) -> str:
    """What was measured on which machine, and how to read `kernel_table`."""
    document = next(iter(documents.values()))
    text = (
        f"**{document['device']}** ({document['dtype']}, torch {document['torch']}, {document['date']}). Medians; "
        '"of copy" is the speed of a copy of the bytes that the op must move, measured in the same run'
    )
    if len(environments(document)) > 1:
        text += "; with bound threads and recycled memory, in brackets in the default environment"
    return text + "; memory is the peak beside the inputs."


def slower_table(documents: dict[str, dict[str, Any]]) -> Table:
    """The negative results: every measured case in which something else was faster than ours."""
    environment = environments(next(iter(documents.values())))[0]
    lines, total, clear = [], 0, 0
    for op, document in documents.items():
        for name, shapes, rows in cases(document, environment):
            ours, best = rows["ours"], best_baseline(rows)
            if best is None:
                continue
            total += 1
            ratio = best["seconds"] / ours["seconds"]
            if ratio < 1:
                apart = best["quartiles"][1] < ours["quartiles"][0]
                clear += apart
                inside = ", ".join(f"{key} {value}" for key, value in shapes.items())
                lines.append((f"`{op}`", name, inside, best["variant"], f"{ratio:.2f}x", "yes" if apart else "no"))
    title = (
        f"Of {total} cases in the {environment} environment, ours is the slower one in {len(lines)}, "
        f"and in {clear} of them beyond the quartiles of both."
    )
    return Table(title, ("op", "case", "shapes", "faster", "its time over ours", "beyond the quartiles"), lines)


def growth(document: dict[str, Any], environment: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """`{case: {variant: [(N, seconds)]}}` over the sweep of N at the shapes that stand for the op."""
    wanted = {key: value for key, value in centre(document).items() if key not in ("N", "rows")}
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, shapes, rows in cases(document, environment):
        size = shapes.get("N", shapes.get("rows"))
        if all(shapes.get(key) == value for key, value in wanted.items()) and shapes.get("B", 1) == 1:
            for variant, row in rows.items():
                curves.setdefault(name, {}).setdefault(variant, []).append((size, row["seconds"]))
    for variants in curves.values():
        for points in variants.values():
            points.sort()
    return curves


def exponent(points: list[tuple[int, float]]) -> float:
    """x of time ~ N^x between the two largest sizes, where fixed costs no longer count."""
    (n0, t0), (n1, t1) = points[-2:]
    return math.log(t1 / t0) / math.log(n1 / n0)


def growth_table(documents: dict[str, dict[str, Any]]) -> Table:
    """How time grows with the bytes of text, from the second largest to the largest size measured."""
    lines = []
    for op, document in documents.items():
        for name, variants in growth(document, environments(document)[0]).items():
            others = {v: p for v, p in variants.items() if v not in NOT_A_BASELINE and len(p) == len(variants["ours"])}
            ours = variants["ours"]
            if len(ours) < 2 or not others:
                continue
            best = min(others, key=lambda variant: others[variant][-1][1])
            sizes = f"{ours[-2][0]} to {ours[-1][0]}"
            lines.append(
                (f"`{op}`", name, sizes, f"N^{exponent(ours):.2f}", f"N^{exponent(others[best]):.2f} ({best})")
            )
    return Table("How time grows with N", ("op", "case", "N", "ours", "the best other way"), lines)
