"""Times the cases of an op beside their baselines and beside a copy of the same number of bytes, all interleaved.

The check of a case runs before any timing and raises when results differ: no speed is reported for a wrong result.

On the CPU every op is measured twice, in processes of its own: in the measuring environment (threads bound to cores;
freed memory kept by malloc, so that outputs are not page-faulted in on every call) and in the default one. In each
round every variant is timed once, so that what disturbs the machine disturbs all variants alike; results hold medians
over rounds and the quartiles. "copy" is `dst.copy_(src)` of half the case's bytes, which reads plus writes that many.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..machine import REPOSITORY, device_name
from ..timing import Measured, format_seconds, on_device, peak_bytes
from .cases import Case

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "measuring": {
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": "cores",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    },
    "default": {},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, and how.

    Attributes:
        device: "cpu" or "cuda".
        quick: only the short list of cases.
        tiny: the cases of a GPU in tiny sizes, on the CPU: whether they run, not how fast.
        rounds: interleaved repeats of every measurement.
        case: only cases whose label contains this.
        environments: names of ENVIRONMENTS, in the order in which they are measured.
    """

    device: str = "cpu"
    quick: bool = False
    tiny: bool = False
    rounds: int = 15
    case: str = ""
    environments: tuple[str, ...] = tuple(ENVIRONMENTS)


def measure(op: str, options: Options) -> Iterator[dict[str, Any]]:
    """Runs `benchmarks/ops/<op>.py` in each environment, in a process of its own.

    Yields after each case the result until then; the last is whole, and is what is kept as JSON.

    On the CPU the default environment gets the short list, unless cases are named: it is there to show what the other
    one hides.

    Raises:
        ValueError: no case of the op has `options.case` in its label.
        RuntimeError: the process failed; it has said on stderr why.
    """
    controlled = {name for variables in ENVIRONMENTS.values() for name in variables}
    inherited = {name: value for name, value in os.environ.items() if name not in controlled}
    device = device_name(torch.device(options.device))  # a process whose threads are bound sees fewer cores
    asked = {"quick": options.quick, "case": options.case} | ({"tiny": True} if options.tiny else {})
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for environment in options.environments:
        short = environment == "default" and options.device == "cpu" and not options.case
        request = {
            "op": op,
            "device": options.device,
            "quick": options.quick or short,
            "tiny": options.tiny,
            "rounds": options.rounds,
            "case": options.case,
        }
        command = [sys.executable, "-m", "benchmarks.ops.worker", json.dumps(request)]
        variables = inherited | ENVIRONMENTS[environment]
        with subprocess.Popen(command, env=variables, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                answer = json.loads(line)
                facts = facts or answer["facts"] | {"device": device}
                rows += [{"environment": environment, **row} for row in answer["rows"]]
                yield {"op": op, **facts, **asked, "environments": ENVIRONMENTS, "rows": rows}
        if worker.returncode != 0:
            raise RuntimeError(f"{op}: its benchmark failed in the {environment} environment, as said above")
    if not rows:
        raise ValueError(f"ops: --case: expected part of the name of a case of {op}, got {options.case!r}")


def run(cases: Iterable[Case], device: torch.device, rounds: int, only: str = "") -> Iterator[list[dict[str, Any]]]:
    """Checks and times every case whose label contains `only`: yields the rows of a case, one for each variant."""
    with on_device(device):
        for case in cases:
            if only not in case.label:
                continue
            if case.check is not None:
                case.check()
            timed = _time_case(case, device, rounds)
            print(f"  {case.label}: {format_seconds(timed[0]['seconds'])}", file=sys.stderr)
            del case
            gc.collect()
            yield timed


def _time_case(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    source = torch.zeros(case.bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    variants: dict[str, Callable[[], Any]] = {**case.variants, "copy": lambda: target.copy_(source)}
    for call in variants.values():
        call()  # compilation, first touch of memory
    peaks = {name: peak_bytes(call, device) for name, call in variants.items()}
    measured = {name: Measured(call, device, graph=case.graph or name == "copy") for name, call in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, timer in measured.items():
            times[name].append(timer.sample())
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    first = next(iter(variants))
    rows = []
    for name, samples in times.items():
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if rounds > 1 else [medians[name]] * 3
        rows.append(
            {
                "case": case.name,
                "shapes": case.shapes,
                "headline": case.headline,
                "sweep": case.sweep,
                "variant": name,
                "seconds": medians[name],
                "quartiles": [low, high],
                "rounds": rounds,
                "bytes": case.bytes,
                "gb_per_second": case.bytes / medians[name] / 1e9,
                "fraction_of_copy": medians["copy"] / medians[name],
                "slower_than_first": medians[name] / medians[first],
                "peak_bytes": peaks[name],
                "graph": measured[name].graph,
            }
        )
    return rows
