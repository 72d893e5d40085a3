"""`python -m benchmarks report`: tables and plots from results.

Without options README.md, docs/results.md and docs/plots/ are made to show what is committed under
benchmarks/results/<device>/, and docs/design.md what csrc/cuda/budget.json predicts; --check fails where they do not.
--results FOLDER prints the tables of other results and puts the plots beside them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import entropy_models, overhead, rows, table_optimizers
from ..flop_matched import results
from ..flop_matched.summary import SMOKE, backends, realisation_line, tables, where
from ..machine import REPOSITORY
from ..ops import OPS
from ..store import read
from . import predictions
from .plots import digest, draw, drawn_digest, plots
from .tables import (
    baseline_name,
    device_line,
    growth_table,
    kernel_table,
    legend,
    short_table,
    shown_in,
    slower_table,
    speedup,
    step_line,
)

RESULTS = REPOSITORY / "benchmarks" / "results"
README = REPOSITORY / "README.md"
ALL_TABLES = REPOSITORY / "docs" / "results.md"
DESIGN = REPOSITORY / "docs" / "design.md"
PLOTS = REPOSITORY / "docs" / "plots"

ROWS_EXPLAINED = (
    "Packed rows of `PackedBatches` with 64 open documents, by `python -m benchmarks rows`. The last two columns are "
    "of rows that each hold one document or a part of one, of 1.3 times the tokens of the longest sequence."
)

Kernels = dict[str, dict[str, Any]]  # results of the ops on one device, by op


def devices(root: Path) -> Iterator[tuple[str, Kernels, dict[str, list[dict[str, Any]]]]]:
    """`(folder, kernel results by op, finished FLOP-matched jobs by scale)` of every device that has any.

    Raises:
        ValueError: there is no such folder, or a result in it is damaged.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder of results, got none")
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        kernels = {op: read(folder / f"{op}.json") for op in OPS if (folder / f"{op}.json").exists()}
        jobs: dict[str, list[dict[str, Any]]] = {}
        for path in sorted((folder / results.FOLDER).glob("*/*.json")):
            job = results.read(path)
            if job is not None and job["finished"]:
                jobs.setdefault(path.parent.name, []).append(job)
        if kernels or jobs:
            yield folder.name, kernels, jobs


def top(root: Path) -> str:
    """Markdown for the first lines of README.md: a few ratios on every device."""
    parts = []
    for _, kernels, _ in devices(root):
        if kernels:
            result = next(iter(kernels.values()))
            parts.append(f"Against the best other implementation, on {result['device']} ({result['dtype']}):")
            lines = [
                f"- **{speedup(rows, best):.1f}x** `{op}`, {name} (baseline: {baseline_name(best['variant'])})"
                for op, name, rows, best in shown_in(kernels, "top")
            ]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def short(root: Path) -> str:
    """Markdown for the results of README.md: a few ops, and BLT beside token models, on every device."""
    parts, on_gpu, quality_measured = [], False, False
    for _, kernels, jobs in devices(root):
        on_gpu = on_gpu or any("cuda" in result for result in kernels.values())
        if kernels:
            explained = (
                "The baseline is the fastest other implementation that was measured (the PyTorch definition is that of "
                "`blt_kernels/reference/`); below 1 ours is slower."
            )
            parts += [f"{device_line(kernels)} {explained}", short_table(kernels).markdown()]
            parts.append(slower_table(kernels).title)
        for scale, done in jobs.items():
            parts += realisation_line(scale, done)
            quality_measured = quality_measured or not any(job["smoke"] for job in done)
    missing = []
    if not on_gpu:
        missing.append("**GPU: not measured.** The CUDA kernels have not been run on a GPU yet.")
    if not quality_measured:
        missing.append("**Quality of BLT against token models: not measured.** What was trained is a smoke test.")
    parts += [" ".join(missing)] if missing else []
    return "\n\n".join([*parts, "All tables and plots, and where ours is slower: [docs/results.md](docs/results.md)."])


def full(root: Path, plots_at: str) -> str:
    """Markdown: all that there is, where ours is slower included.

    Args:
        plots_at: the folder of <device>/<plot>.png, as the page sees it.
    """
    parts = ["# Results", "Made by `python -m benchmarks report` from the JSON under `benchmarks/results/`."]
    for folder, kernels, jobs in devices(root):
        shown = {name: f"![{name}]({plots_at}/{folder}/{name}.png)" for name in plots(kernels, jobs)}
        parts.append(f"## {folder}")
        if kernels:
            growing, slower = growth_table(kernels), slower_table(kernels)
            parts += ["### Kernels", legend(kernels), kernel_table(kernels).markdown()]
            parts += [shown["speedup"], shown["roofline"]]
            parts += [f"### {growing.title}", "N is bytes of text, or the rows that a gradient lists."]
            parts += [growing.markdown() if growing.rows else "Not measured: one size of N."]
            parts += [shown["time_against_n"]] if "time_against_n" in shown else []
            parts += ["### Where ours is slower", slower.title]
            parts += [slower.markdown()] if slower.rows else []
        if (calls := root / folder / overhead.FILE).exists():
            parts += overhead.section(overhead.read(calls))
        if (optimizers := table_optimizers.read(root / folder / table_optimizers.FILE)) is not None:
            parts += ["### Optimisers of hash tables", *table_optimizers.markdown(optimizers), *step_line(kernels)]
        if (cutters := entropy_models.read(root / folder / entropy_models.FILE)) is not None:
            parts += ["### Entropy models with tables of n-grams", *entropy_models.markdown(cutters)]
        for scale, done in jobs.items():
            parts += [f"### BLT and token models, {scale} scale", f"{where(done)}."]
            parts += [f"**{SMOKE}.**"] if any(job["smoke"] for job in done) else []
            for table in tables(done):
                parts += [f"{table.title}:", table.markdown()]
            parts += [f"{line}." for line in backends(done)]
            parts += [image for name, image in shown.items() if name.startswith(f"quality_{scale}_")]
        if packed := rows.read_all(root / folder):
            parts += ["### How full rows are", ROWS_EXPLAINED, rows.table(packed).markdown()]
    return "\n\n".join(parts) + "\n"


def predicted(root: Path) -> str:
    """Markdown for docs/design.md: what the compiled kernels cost, what that predicts, and what GPUs achieved."""
    on_gpu = {
        f"{result['device']} {op}": result
        for _, kernels, _ in devices(root)
        for op, result in kernels.items()
        if "cuda" in result
    }
    return predictions.table(on_gpu).markdown()


def between(text: str, block: str, content: str) -> str:
    """`text` with `content` between the two markers of a generated block.

    Raises:
        ValueError: it has no such markers.
    """
    begin, end = f"<!-- {block}: begin (python -m benchmarks report) -->", f"<!-- {block}: end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"expected the markers {begin} and {end}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def pages() -> dict[Path, str]:
    """The generated pages as they should be.

    Raises:
        ValueError: README.md or docs/design.md has no markers.
    """
    readme = between(README.read_text(), "headline", top(RESULTS))
    readme = between(readme, "results", short(RESULTS))
    design = between(DESIGN.read_text(), "predictions", predicted(RESULTS))
    return {README: readme, ALL_TABLES: full(RESULTS, PLOTS.name), DESIGN: design}


def write() -> None:
    """Makes the generated pages current."""
    for path, text in pages().items():
        path.write_text(text)


def stale_plots(root: Path, plots_folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """`(path, name, data)` of every plot that does not show its data."""
    for folder, kernels, jobs in devices(root):
        for name, data in plots(kernels, jobs).items():
            path = plots_folder / folder / f"{name}.png"
            if drawn_digest(path) != digest(data):
                yield path, name, data


def stale() -> list[str]:
    """What does not show the committed results."""
    found = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    found += [path for path, _, _ in stale_plots(RESULTS, PLOTS)]
    return [str(path.relative_to(REPOSITORY)) for path in found]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing: fail where something is not current")
    parser.add_argument("--results", type=Path, help="folder of <device>/<op>.json to print instead")
    options = parser.parse_args(arguments)
    if options.check:
        if found := stale():
            sys.exit(f"not current, run `python -m benchmarks report`: {', '.join(found)}")
        return
    if options.results is None:
        write()
        root, plots_folder = RESULTS, PLOTS
    else:
        root = plots_folder = options.results
        if not any(devices(root)):
            raise ValueError(f"{root}: expected results in folders of devices, got none")
        print(full(root, str(root)))
    for path, name, data in stale_plots(root, plots_folder):
        draw(name, data, path)
        print(path)
