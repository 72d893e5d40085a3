"""Times an op beside its baselines and beside a copy of the same number of bytes, all in one interleaved run.

A benchmark is a script that yields cases and hands over to `main`:

    from harness import Case, main

    def cases():
        x = torch.randn(...)
        yield Case(
            name="forward",                                  # unique within the script
            shapes={"B": 4, "N": 4096, "D": 1024},           # whatever says what was run
            variants={"ours": lambda: op(x), "eager": lambda: eager(x)},
            bytes=...,                                       # each input read once + each output written once
            check=lambda: torch.testing.assert_close(op(x), eager(x)),
        )

    if __name__ == "__main__":
        main("patch_pool", cases)

`cases` may be a generator: a case is built, checked, timed and dropped before the next, so closures hold its tensors.
`check` runs before any timing and raises when the results are wrong. Variants are called without arguments; the first
is the op under test, the "x slower" column compares the others with it. `geometric_lengths` draws ragged patches.

    python benchmarks/patch_pool.py [--json] [--case SUBSTRING] [--environment measuring] [--rounds 15]

The script runs itself twice: in the measuring environment (threads bound to cores; freed memory kept by malloc, so
that outputs are not page-faulted in on every call) and in the default one. Every variant is timed once a round, in
turn, so that what disturbs the machine disturbs all alike; the table has medians over rounds and the quartiles. "copy"
is `dst.copy_(src)` of half the case's bytes, which reads plus writes that many. --json also writes
benchmarks/results/<device>/<op>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import blt_kernels

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "measuring": {
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": "cores",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    },
    "default": {},
}
ROUND_SECONDS = 0.02  # a variant is called as often in a round as fits, at least once
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    shapes: dict[str, Any]
    variants: dict[str, Callable[[], Any]]
    bytes: int
    check: Callable[[], None] | None = None

    @property
    def label(self) -> str:
        return label(self.name, self.shapes)


def label(name: str, shapes: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in shapes.items())])


def run(cases: Iterable[Case], rounds: int = 15, only: str = "") -> list[dict[str, Any]]:
    """Checks and times every case whose label contains `only`: one row per case and variant."""
    rows = []
    for case in cases:
        if only not in case.label:
            continue
        if case.check is not None:
            case.check()
        rows += _time_case(case, rounds)
        gc.collect()
    return rows


def geometric_lengths(batch: int, num_bytes: int, mean: float) -> torch.Tensor:
    """Patch lengths [batch, P] with this mean, spread as segmented text has them; every row sums to num_bytes."""
    starts = torch.rand(batch, num_bytes) < 1 / mean
    starts[:, 0] = True
    end = torch.tensor([num_bytes])
    rows = [torch.diff(row.nonzero().flatten(), append=end) for row in starts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def main(op: str, cases: Callable[[], Iterable[Case]]) -> None:
    parser = argparse.ArgumentParser(description=f"Benchmark of {op}; see benchmarks/harness.py.")
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/<device>/<op>.json")
    parser.add_argument("--case", default="", help="only cases whose name and shapes contain this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--environment", choices=ENVIRONMENTS, help="only this one")
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # where the run of one environment leaves its rows
    options = parser.parse_args()
    if options.rows:
        Path(options.rows).write_text(json.dumps(run(cases(), options.rounds, options.case)))
        return
    controlled = {name for variables in ENVIRONMENTS.values() for name in variables}
    rows = []
    for environment, variables in ENVIRONMENTS.items():
        if options.environment not in (None, environment):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            inherited = {name: value for name, value in os.environ.items() if name not in controlled}
            subprocess.run([sys.executable, *sys.argv, "--rows", str(path)], env=inherited | variables, check=True)
            rows += [{"environment": environment, **row} for row in json.loads(path.read_text())]
    header = describe_machine()
    print_table(op, header, rows)
    if options.json:
        path = REPOSITORY / "benchmarks" / "results" / header["device_slug"] / f"{op}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"op": op, **header, "environments": ENVIRONMENTS, "rows": rows}, indent=1) + "\n")
        print(f"wrote {path.relative_to(REPOSITORY)}")


def _time_case(case: Case, rounds: int) -> list[dict[str, Any]]:
    source = torch.zeros(case.bytes // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    variants: dict[str, Callable[[], Any]] = {**case.variants, "copy": lambda: target.copy_(source)}
    calls = {}
    for name, fn in variants.items():
        fn()  # warm-up: compilation, first touch of memory
        calls[name] = max(1, int(ROUND_SECONDS / max(_seconds(fn, 1), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, fn in variants.items():
            fn()  # the caches hold this variant's data, not the previous one's
            times[name].append(_seconds(fn, calls[name]))
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    first = next(iter(variants))
    rows = []
    for name, samples in times.items():
        low, _, high = statistics.quantiles(samples, n=4) if rounds > 1 else [medians[name]] * 3
        rows.append(
            {
                "case": case.name,
                "shapes": case.shapes,
                "variant": name,
                "seconds": medians[name],
                "quartiles": [low, high],
                "rounds": rounds,
                "calls_per_round": calls[name],
                "bytes": case.bytes,
                "gb_per_second": case.bytes / medians[name] / 1e9,
                "fraction_of_copy": medians["copy"] / medians[name],
                "slower_than_first": medians[name] / medians[first],
            }
        )
    return rows


def _seconds(fn: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text())):
        model = match[1]
    cores = len(os.sched_getaffinity(0))
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return {
        "device": f"{model}, {cores} cores",
        "device_slug": re.sub(r"[^a-z0-9]+", "-", f"{model} {cores} cores".lower()).strip("-"),
        "cpu_capability": torch.ops.blt_kernels.cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "blt_kernels": blt_kernels.__version__,
        "commit": commit + ("+changes" if dirty.stdout else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def print_table(op: str, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{op} on {header['device']} ({header['cpu_capability']}, {header['threads']} threads), "
        f"torch {header['torch']}, commit {header['commit'][:12]}"
    )
    columns = ("environment", "case", "variant", "median", "quartiles", "GB/s", "of copy", "x slower")
    table = [columns]
    for row in rows:
        low, high = row["quartiles"]
        table.append(
            (
                row["environment"],
                label(row["case"], row["shapes"]),
                row["variant"],
                _time(row["seconds"]),
                f"{_time(low)} .. {_time(high)}",
                f"{row['gb_per_second']:.1f}",
                f"{row['fraction_of_copy']:.0%}",
                f"{row['slower_than_first']:.2f}",
            )
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    previous = None
    for line in table:
        if previous not in (None, line[:2]):
            print()
        previous = line[:2]
        left, right = line[:3], line[3:]
        cells = [cell.ljust(w) for cell, w in zip(left, widths, strict=False)]
        print("  ".join(cells + [cell.rjust(w) for cell, w in zip(right, widths[3:], strict=True)]))


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.2f} us"
