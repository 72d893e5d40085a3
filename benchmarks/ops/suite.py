"""`python -m benchmarks ops`: times the ops beside PyTorch and beside a copy of the same bytes.

All cases of all ops take about 40 minutes on two cores; --quick takes one size of each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..machine import device_name
from ..report.table import Table
from ..store import compare, read, refuse_to_lose, result_path, write, write_partial
from ..timing import format_seconds
from . import OPS
from .cases import label
from .measure import ENVIRONMENTS, Options, measure


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"by default all of: {', '.join(OPS)}")
    parser.add_argument("--quick", action="store_true", help="one size of each op")
    parser.add_argument(
        "--tiny", action="store_true", help="a GPU's cases in tiny sizes, on the CPU: whether they run, not how fast"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", default="", help="only cases whose name and shapes contain this, as they are printed")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved repeats of every measurement (default: 15)")
    parser.add_argument(
        "--environment",
        choices=tuple(ENVIRONMENTS),
        help="measuring (bound threads, recycled memory) or default; by default both, on a GPU the default one",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of <device>/<op>.json (default: runs/bench)"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("OLD", "NEW"),
        help="measure nothing: compare two results of one op; exit status 1 when ours got slower",
    )
    options = parser.parse_args(arguments)
    if options.compare is not None:
        sys.exit(1 if print_comparison(*options.compare) else 0)
    every = ("default",) if options.device == "cuda" or options.tiny else tuple(ENVIRONMENTS)
    environments = every if options.environment is None else (options.environment,)
    chosen = Options(
        device=options.device,
        quick=options.quick,
        tiny=options.tiny,
        rounds=options.rounds,
        case=options.case,
        environments=environments,
    )
    run_suite(options.ops, chosen, options.out.resolve())


def run_suite(ops: Sequence[str], options: Options, out: Path) -> list[Path]:
    """Measures `ops` (all when empty) and writes one JSON file for each, as far as it has come after every case.

    Raises:
        ValueError: an op, device, number of rounds or case that does not exist; or a result in `out` holds more than
            would be measured now. Nothing is measured then.
        OSError: `out` cannot be made.
        RuntimeError: a benchmark failed.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"ops: op: expected one of {', '.join(OPS)}, got {op!r}")
    if options.rounds < 1:
        raise ValueError(f"ops: --rounds: expected at least 1, got {options.rounds}")
    if options.tiny and options.device != "cpu":
        raise ValueError(f"ops: --tiny: expected --device cpu, got {options.device}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("ops: --device: expected cpu, got cuda: torch sees no GPU here")
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is found before anything is measured
    for op in ops or OPS:
        refuse_to_lose(result_path(out, device_name(torch.device(options.device)), op), options)
    paths = []
    for op in ops or OPS:
        begin = time.perf_counter()
        for result in measure(op, options):
            partial = write_partial(result, out)
        machine = f"{result['device']} ({result['dtype']}, {result['cpu_capability']}, "
        versions = f"{result['threads']} threads), torch {result['torch']}, commit {result['commit'][:12]}"
        print(f"\n{op} on {machine}{versions}")
        for table in tables(result):
            table.show()
        paths.append(write(result, out))
        partial.unlink()
        print(f"{op}: {time.perf_counter() - begin:.0f} s; {paths[-1]}", flush=True)
    return paths


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """A table for each case in each environment, with a line for each variant."""
    columns = ("variant", "median", "quartiles", "GB/s", "of copy", "time over ours", "peak MB")
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in result["rows"]:
        low, high = row["quartiles"]
        line = (
            row["variant"],
            format_seconds(row["seconds"]),
            f"{format_seconds(low)} .. {format_seconds(high)}",
            f"{row['gb_per_second']:.1f}",
            f"{row['fraction_of_copy']:.0%}",
            f"{row['slower_than_first']:.2f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
        )
        title = f"{label(row['case'], row['shapes'])} ({row['environment']} environment)"
        groups.setdefault(title, []).append(line)
    for title, lines in groups.items():
        yield Table(title, columns, lines)


def print_comparison(old: Path, new: Path) -> bool:
    """Prints how two results of one op differ; True when something of ours got slower."""
    rows = sorted(compare(read(old), read(new)), key=lambda row: row["change"], reverse=True)
    columns = ("case", "variant", "environment", "old ms", "new ms", "new/old", "new/old of copy", "verdict")
    lines = []
    for row in rows:
        before, after = (f"{1e3 * seconds:.3f}" for seconds in row["seconds"])
        cells = (row["case"], row["variant"], row["environment"], before, after)
        lines.append((*cells, f"{row['change']:.2f}", f"{row['machine']:.2f}", row["verdict"]))
    Table(f"{len(rows)} rows that both results have", columns, lines).show()
    return any(row["verdict"] == "slower" and row["variant"] == "ours" for row in rows)
