"""README tables and plots from committed results: `python -m benchmarks.report`, or `--check` that they are current.

Every figure comes from the JSON under benchmarks/results/<device>/. A plot carries the digest of what it shows, so
that a check needs no pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blt_kernels._optional import new_figure, optional

from .harness import OPS, REPOSITORY
from .results import read

RESULTS = REPOSITORY / "benchmarks" / "results"
README = REPOSITORY / "README.md"
PLOTS = REPOSITORY / "docs" / "plots"
BEGIN, END = "<!-- results: begin (python -m benchmarks.report) -->", "<!-- results: end -->"

# Variants that are ours in another form, or no op at all.
NOT_A_BASELINE = ("ours", "copy", "entropy, then segment", "F.linear, our entropy")
# The cases that stand for an op in tables: their names, where they are not "forward" and "backward", and their shapes.
CENTRE_NAMES = {"hash_ngram_embedding": ("forward with base", "both, sparse gradient")}
COMMON = {"N": 16384, "D": 1024, "patches": "text 4.5"}
CENTRES: dict[str, dict[str, Any]] = {
    "segment_logits": {"N": 16384, "patches": "mean 4.5"},
    "linear_entropy": {"rows": 4096, "D": 768, "dtype": "float32"},
    "patch_pool": COMMON,
    "patch_gather": COMMON,
    "encoder_cross_attention": {"N": 16384, "H": 16, "K": 2, "patches": "text 4.5"},
    "decoder_cross_attention": {"N": 16384, "H": 16, "K": 2, "patches": "text 4.5"},
    "hash_ngram_embedding": {"N": 16384, "D": 1024, "tokens": "text"},
}
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


def centres(document: dict[str, Any], environment: str) -> Iterator[tuple[str, Case]]:
    """`(case, rows)` of the cases that stand for the op."""
    wanted = CENTRES[document["op"]]
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


def kernel_section(documents: dict[str, dict[str, Any]]) -> str:
    """Markdown: one table for the ops at the shapes that stand for them, and where ours is the slower one."""
    any_document = next(iter(documents.values()))
    leading = environments(any_document)[0]
    facts = f"{any_document['dtype']}, torch {any_document['torch']}, {any_document['date']}"
    lines = [
        f"**{any_document['device']}** ({facts}). {_legend(any_document)}",
        "",
        "| op | case | time | of copy | the best other way | it takes | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for op in OPS:
        if op not in documents:
            lines.append(f"| `{op}` | | not measured | | | | |")
            continue
        other = {environment: dict(centres(documents[op], environment)) for environment in environments(documents[op])}
        for name, rows in other[leading].items():
            ours, best = rows["ours"], best_baseline(rows)
            shares = [f"{cases[name]['ours']['fraction_of_copy']:.0%}" for cases in other.values() if name in cases]
            share = shares[0] if len(shares) == 1 else f"{shares[0]} ({', '.join(shares[1:])})"
            cells = [f"`{op}`", name, _milliseconds(ours["seconds"]), share]
            if best is not None:
                memory = f"{_megabytes(ours['peak_bytes'])} against {_megabytes(best['peak_bytes'])}"
                cells += [best["variant"], f"{best['seconds'] / ours['seconds']:.1f}x", memory]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_slower(documents, leading)])


def _legend(document: dict[str, Any]) -> str:
    text = 'Medians; "of copy" is the speed of a copy of the bytes that the op must move, measured in the same run'
    if len(environments(document)) > 1:
        text += "; with bound threads and recycled memory, in brackets in the default environment"
    return text + "; memory is the peak beside the inputs."


def _slower(documents: dict[str, dict[str, Any]], environment: str) -> Iterator[str]:
    """Every measured case in which something else was faster than ours: the negative results."""
    found, total = [], 0
    for op, document in documents.items():
        for name, shapes, rows in cases(document, environment):
            best = best_baseline(rows)
            if best is None:
                continue
            total += 1
            if best["seconds"] < rows["ours"]["seconds"]:
                inside = ", ".join(f"{key} {value}" for key, value in shapes.items())
                ratio = best["seconds"] / rows["ours"]["seconds"]
                found.append(f"| `{op}` | {name} | {inside} | {best['variant']} | {ratio:.2f}x |")
    yield f"Of {total} cases in the {environment} environment, ours is the slower one in {len(found)}:"
    if found:
        yield from ("", "| op | case | shapes | faster | its time |", "|---|---|---|---|---|", *found)


def growth(document: dict[str, Any], environment: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """`{case: {variant: [(N, seconds)]}}` over the sweep of N at the shapes that stand for the op."""
    wanted = {key: value for key, value in CENTRES[document["op"]].items() if key not in ("N", "rows")}
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


def growth_section(documents: dict[str, dict[str, Any]]) -> str:
    """Markdown: how time grows with the bytes of text, from the second largest to the largest size."""
    lines = ["| op | case | N | ours | the best other way |", "|---|---|---|---|---|"]
    for op, document in documents.items():
        for name, variants in growth(document, environments(document)[0]).items():
            others = {v: p for v, p in variants.items() if v not in NOT_A_BASELINE and len(p) == len(variants["ours"])}
            ours = variants["ours"]
            if len(ours) < 2 or not others:
                continue
            best = min(others, key=lambda variant: others[variant][-1][1])
            sizes = f"{ours[-2][0]} to {ours[-1][0]}"
            cells = (f"`{op}`", name, sizes, f"N^{exponent(ours):.2f}", f"N^{exponent(others[best]):.2f} ({best})")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def section() -> str:
    """The README's results, markers included."""
    parts = [BEGIN]
    measured_on_gpu = False
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        documents = load(folder)
        if not documents:
            continue
        measured_on_gpu = measured_on_gpu or any("cuda" in document for document in documents.values())
        parts += ["", kernel_section(documents)]
        if table := growth_section(documents):
            parts += ["", "How time grows with N:", "", table]
        parts += ["", *(f"![{name}](docs/plots/{folder.name}/{name}.png)" for name in plots(documents))]
    if not measured_on_gpu:
        parts += ["", "**GPU: not measured.** The CUDA kernels have not been run on a GPU yet."]
    return "\n".join([*parts, "", END])


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The kernel results of one device, by op."""
    return {op: read(folder / f"{op}.json") for op in OPS if (folder / f"{op}.json").exists()}


def plots(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What each plot shows, as plain data, by name."""
    leading = environments(next(iter(documents.values())))[0]
    speedups, rates, curves = {}, {}, {}
    for op, document in documents.items():
        for name, rows in centres(document, leading):
            ours = rows["ours"]
            speedups[f"{op}, {name}"] = {
                variant: row["seconds"] / ours["seconds"]
                for variant, row in rows.items()
                if variant not in NOT_A_BASELINE
            }
            rates[f"{op}, {name}"] = {"ours": ours["gb_per_second"], "copy": rows["copy"]["gb_per_second"]}
        for name, variants in growth(document, leading).items():
            if all(len(points) > 1 for points in variants.values()):
                curves[f"{op}, {name}"] = variants
    made = {"speedup": speedups, "roofline": rates}
    return made | ({"time_against_n": curves} if curves else {})


def draw(name: str, data: dict[str, Any], path: Path) -> None:
    """Draws one of `plots` as a PNG that carries the digest of its data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = {"speedup": _draw_speedup, "roofline": _draw_rates, "time_against_n": _draw_growth}[name](data)
    figure.savefig(path, dpi=100, metadata={"Source": digest(data)})


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def drawn_digest(path: Path) -> str | None:
    """The digest in a plot that `draw` has made; None where there is no such plot."""
    if not path.exists():
        return None
    image = optional("PIL.Image").open(path)
    return image.info.get("Source")


def _draw_speedup(data: dict[str, dict[str, float]]) -> Any:
    rows = [(case, variant, value) for case, variants in data.items() for variant, value in variants.items()]
    figure = new_figure(11, 0.24 * len(rows) + 1.2)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    colors = {case: f"C{i % 10}" for i, case in enumerate(data)}
    axes.barh(range(len(rows)), [value for _, _, value in rows], color=[colors[case] for case, _, _ in rows])
    axes.set_yticks(range(len(rows)), [f"{case}: {variant}" for case, variant, _ in rows], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("time over that of blt_kernels (log scale; left of the line it is faster than ours)")
    return figure


def _draw_rates(data: dict[str, dict[str, float]]) -> Any:
    figure = new_figure(11, 0.4 * len(data) + 1.2)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for offset, which in ((-0.2, "ours"), (0.2, "copy")):
        heights = [values[which] for values in data.values()]
        axes.barh([i + offset for i in range(len(data))], heights, height=0.38, label=which)
    axes.set_yticks(range(len(data)), list(data), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of the bytes that must move, beside a copy of as many in the same run")
    axes.legend()
    return figure


def _draw_growth(data: dict[str, dict[str, list[tuple[int, float]]]]) -> Any:
    columns = 3
    rows = -(-len(data) // columns)
    figure = new_figure(5 * columns, 3.2 * rows)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, variants) in zip(grid.flat, data.items(), strict=False):
        for variant, points in variants.items():
            style = {"ours": {"linewidth": 2.5, "color": "black"}, "copy": {"linestyle": ":", "color": "gray"}}
            axes.plot(*zip(*points, strict=True), marker=".", label=variant, **style.get(variant, {}))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("bytes")
        axes.set_ylabel("seconds")
        axes.legend(fontsize=6)
    for axes in list(grid.flat)[len(data) :]:
        axes.set_visible(False)
    return figure


def with_section(text: str) -> str:
    """README text with its results section replaced.

    Raises:
        ValueError: it has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{README}: expected the markers {BEGIN} and {END}")
    return before + section() + after


def stale() -> list[str]:
    """What does not show the committed results: README.md, or plots."""
    found = [] if with_section(README.read_text()) == README.read_text() else [README.name]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        if documents := load(folder):
            for name, data in plots(documents).items():
                path = PLOTS / folder.name / f"{name}.png"
                if drawn_digest(path) != digest(data):
                    found.append(str(path.relative_to(REPOSITORY)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing: fail where something is not current")
    if parser.parse_args().check:
        if found := stale():
            sys.exit(f"not current, run `python -m benchmarks.report`: {', '.join(found)}")
        return
    README.write_text(with_section(README.read_text()))
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        if documents := load(folder):
            for name, data in plots(documents).items():
                path = PLOTS / folder.name / f"{name}.png"
                if drawn_digest(path) != digest(data):
                    draw(name, data, path)


if __name__ == "__main__":
    main()
