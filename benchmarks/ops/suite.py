"""What `blt-kernels bench` does: the kernels of some ops, or all, measured, printed and kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..store import compare, read, write
from .harness import ENVIRONMENTS, OPS, Options, measure, print_table


def run_suite(console: Console, ops: Sequence[str], options: Options, environment: str | None, out: Path) -> list[Path]:
    """Measures `ops` (all when empty) and writes one JSON file for each as it is done.

    Args:
        environment: "measuring" or "default"; None: both, and on a GPU, where they are alike, the default one.

    Raises:
        ValueError: an op, device, environment or case that does not exist. OSError: `out` cannot be made.
        RuntimeError: a benchmark failed.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"bench: op: expected one of {', '.join(OPS)}, got {op!r}")
    if environment not in (None, *ENVIRONMENTS):
        raise ValueError(f"bench: --environment: expected one of {', '.join(ENVIRONMENTS)}, got {environment!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: --device: expected cpu, got cuda: torch sees no GPU here")
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"bench: --device: expected cpu or cuda, got {options.device!r}")
    out.mkdir(parents=True, exist_ok=True)  # rather than find out after measuring
    chosen = [environment] if environment else list(ENVIRONMENTS) if options.device == "cpu" else ["default"]
    paths = []
    for op in ops or OPS:
        begin = time.perf_counter()
        document = measure(op, options, chosen)
        print_table(document)
        paths.append(write(document, out))
        console.print(f"{op}: {time.perf_counter() - begin:.0f} s; {paths[-1]}")
    return paths


def print_comparison(console: Console, old: Path, new: Path) -> bool:
    """Prints how two results of one op differ; True when something of ours got slower."""
    rows = sorted(compare(read(old), read(new)), key=lambda row: row["change"], reverse=True)
    table = Table("environment", "case", "variant", "old ms", "new ms", "change", "machine", "verdict")
    for row in rows:
        before, after = (f"{1e3 * seconds:.3f}" for seconds in row["seconds"])
        cells = (row["environment"], row["case"], row["variant"], before, after)
        table.add_row(*cells, f"{row['change']:.2f}", f"{row['machine']:.2f}", row["verdict"])
    console.print(table)
    console.print(f"{len(rows)} rows in both; change and machine: new over old time, of the row and of the copy")
    return any(row["verdict"] == "slower" and row["variant"] == "ours" for row in rows)
