"""Tables and plots from results: `python -m benchmarks.report`.

Without arguments README.md, docs/results.md and docs/plots/ are made to show what is committed under
benchmarks/results/<device>/; `--check` fails where they do not. `--results FOLDER` prints the tables of other results
and puts the plots beside them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..flop_matched.results import read as read_job
from ..flop_matched.summary import SMOKE, backends, speed, tables, text_of
from ..ops.harness import OPS, REPOSITORY
from ..store import read
from .plots import digest, draw, drawn_digest, plots
from .tables import growth_table, kernel_table, legend, slower_table

RESULTS = REPOSITORY / "benchmarks" / "results"
README = REPOSITORY / "README.md"
ALL_TABLES = REPOSITORY / "docs" / "results.md"
PLOTS = REPOSITORY / "docs" / "plots"
BEGIN, END = "<!-- results: begin (python -m benchmarks.report) -->", "<!-- results: end -->"


Documents = dict[str, dict[str, Any]]


def devices(results: Path) -> Iterator[tuple[str, Documents, dict[str, list[dict[str, Any]]]]]:
    """`(folder, kernel results by op, finished FLOP-matched jobs by scale)` of every device that has any.

    Raises:
        ValueError: there is no such folder, or a result in it is damaged.
    """
    if not results.is_dir():
        raise ValueError(f"{results}: expected a folder of results, got none")
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        documents = {op: read(folder / f"{op}.json") for op in OPS if (folder / f"{op}.json").exists()}
        jobs: dict[str, list[dict[str, Any]]] = {}
        for path in sorted((folder / "flop_matched").glob("*/*.json")):
            job = read_job(path)
            if job is not None and job["finished"]:
                jobs.setdefault(path.parent.name, []).append(job)
        if documents or jobs:
            yield folder.name, documents, jobs


def short(results: Path) -> str:
    """Markdown: the ops at the shapes that stand for them, and BLT beside token models, on every device."""
    parts, kernels_on_gpu, quality = [], False, []
    for folder, documents, jobs in devices(results):
        kernels_on_gpu = kernels_on_gpu or any("cuda" in document for document in documents.values())
        if documents:
            parts += [legend(documents), kernel_table(documents).markdown(), slower_table(documents).title]
        for scale, rows in jobs.items():
            parts.append(f"**BLT and token models of equal FLOPs per byte**, {scale} scale, {_where(rows)}.")
            for size in dict.fromkeys(row["size"] for row in rows if row["size"]):
                if table := speed(size, [row for row in rows if row["size"] == size]):
                    parts += [f"{table.title}:", table.markdown()]
            parts += [f"{line}." for line in backends(rows)]
            quality += [(folder, scale)] if not any(row["smoke"] for row in rows) else []
        parts.append("\n".join(f"![{name}](docs/plots/{folder}/{name}.png)" for name in plots(documents, jobs)))
    if not quality:
        parts.append("**Quality of BLT against token models: not measured.** What was trained so far is a smoke test.")
    if not kernels_on_gpu:
        parts.append("**GPU: not measured.** The CUDA kernels have not been run on a GPU yet.")
    return "\n\n".join([*parts, "All tables, and where something else is faster: [docs/results.md](docs/results.md)."])


def full(results: Path) -> str:
    """Markdown: all that there is, where ours is the slower one included."""
    parts = ["# Results", "Made by `python -m benchmarks.report` from the JSON under `benchmarks/results/`."]
    for folder, documents, jobs in devices(results):
        parts.append(f"## {folder}")
        if documents:
            growing, slower = growth_table(documents), slower_table(documents)
            parts += ["### Kernels", legend(documents), kernel_table(documents).markdown()]
            parts += [f"### {growing.title}", growing.markdown() if growing.rows else "Not measured: one size of N."]
            parts += ["### Where something else is faster", slower.title]
            parts += [slower.markdown()] if slower.rows else []
        for scale, rows in jobs.items():
            parts += [f"### BLT and token models, {scale} scale", f"{_where(rows)}."]
            parts += [f"**{SMOKE}.**"] if any(row["smoke"] for row in rows) else []
            for table in tables(rows):
                parts += [f"{table.title}:", table.markdown()]
            parts += [f"{line}." for line in backends(rows)]
    return "\n\n".join(parts) + "\n"


def _where(rows: list[dict[str, Any]]) -> str:
    machine = rows[0]["machine"]
    return f"{machine['device']}, torch {machine['torch']}, {machine['date']}; {text_of(rows)}"


def pages() -> dict[Path, str]:
    """The generated pages as they should be.

    Raises:
        ValueError: README.md has no markers.
    """
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{README}: expected the markers {BEGIN} and {END}")
    return {README: f"{before}{BEGIN}\n\n{short(RESULTS)}\n\n{END}{after}", ALL_TABLES: full(RESULTS)}


def stale_plots(results: Path, plots_folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """`(path, name, data)` of every plot that does not show its data."""
    for folder, documents, jobs in devices(results):
        for name, data in plots(documents, jobs).items():
            path = plots_folder / folder / f"{name}.png"
            if drawn_digest(path) != digest(data):
                yield path, name, data


def stale() -> list[str]:
    """What does not show the committed results."""
    found = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    found += [path for path, _, _ in stale_plots(RESULTS, PLOTS)]
    return [str(path.relative_to(REPOSITORY)) for path in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing: fail where something is not current")
    parser.add_argument("--results", type=Path, help="folder of <device>/<op>.json to print instead")
    options = parser.parse_args()
    if options.check:
        if found := stale():
            sys.exit(f"not current, run `python -m benchmarks.report`: {', '.join(found)}")
        return
    if options.results is None:
        for path, text in pages().items():
            path.write_text(text)
    else:
        print(full(options.results))
    results, plots_folder = options.results or RESULTS, options.results or PLOTS
    for path, name, data in stale_plots(results, plots_folder):
        draw(name, data, path)
        print(path)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"report: {error}")
