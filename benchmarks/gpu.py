"""`python -m benchmarks gpu`: everything that only a GPU can say, in one command, without a network, in under nine
minutes.

Builds the library against the torch that is there (2.10 or newer), runs tests/cuda on the GPU, compute-sanitizer's
memcheck and racecheck on a small ragged case of every op, and the short list of every op's benchmark. What each step
said goes to <out>/<device>/gpu_report.json as it ends; results of benchmarks lie beside it. Run again at the same
commit, it goes on with the steps that are not done.

It needs torch, cmake, ninja and nvcc. The tests and the sanitizers need pytest and hypothesis too; where they or
compute-sanitizer are missing, these steps say so and the others run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# None of these imports our own library, which is not built yet.
from .machine import REPOSITORY, describe_machine, device_slug
from .ops import OPS
from .store import write_json

BUDGET_SECONDS = 8.5 * 60
TAIL = 4000  # characters of a step's output that are kept
SANITIZED = [sys.executable, "tests/sanitize.py", "cases", "gpu"]


def steps(out: Path) -> dict[str, tuple[list[str], int]]:
    """Command and limit in seconds of each step, in order of what matters most."""
    sanitizer = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--error-exitcode", "9"]
    bench = [sys.executable, "-m", "benchmarks", "ops"]
    made = {
        "tests": ([sys.executable, "-m", "pytest", "tests/cuda", "-q", "-k", "gpu", "-p", "no:cacheprovider"], 180),
        "memcheck": ([*sanitizer, "--tool", "memcheck", *SANITIZED], 90),
        "racecheck": ([*sanitizer, "--tool", "racecheck", *SANITIZED], 90),
    }
    for op in OPS:
        options = ["--device", "cuda", "--quick", "--rounds", "9", "--out", str(out)]
        made[f"bench {op}"] = ([*bench, op, *options], 120)
    return made


def build() -> list[str]:
    torch_folder = Path(torch.__file__).parent
    configure = [
        *("cmake", "-S", ".", "-B", "build/gpu-report", "-G", "Ninja"),
        f"-DBLT_OUTPUT_DIR={REPOSITORY / 'blt_kernels'}",
        f"-DBLT_TORCH_DIR={torch_folder}",
        "-DBLT_BUILD_CUDA=1",
    ]
    return ["bash", "-c", f"{subprocess.list2cmdline(configure)} && cmake --build build/gpu-report"]


def run(command: list[str], limit: float) -> dict[str, Any]:
    """Runs one step, and returns whether it went well, its time, and the end of its output."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        try:
            # A session of its own: what it has started must not go on beside the next step.
            child = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        except FileNotFoundError as error:
            return {"status": "not run", "seconds": 0.0, "output": str(error)}
        try:
            child.wait(limit)
            status = "ok" if child.returncode == 0 else f"exit {child.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = f"stopped after {limit:.0f} s"
        log.seek(0)
        output = log.read().decode(errors="replace")
    step: dict[str, Any] = {
        "status": status,
        "seconds": round(time.perf_counter() - begin, 1),
        "output": output[-TAIL:],
    }
    if counts := re.findall(r"(\d+) (passed|failed|skipped|error)", output[-400:]):
        step["tests"] = {what: int(count) for count, what in counts}
        if status == "ok" and "passed" not in step["tests"]:
            step["status"] = "nothing was tested"
    return step


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "benchmarks" / "results", help="default: benchmarks/results"
    )
    out = parser.parse_args(arguments).out.resolve()
    if not torch.cuda.is_available():
        raise RuntimeError("not run: torch sees no GPU here")
    begin = time.perf_counter()
    built = run(build(), 300)
    print(f"build: {said(built)}", flush=True)
    if built["status"] != "ok":
        sys.exit(built["output"])
    facts = describe_machine(torch.device("cuda"))
    path = out / device_slug(facts["device"]) / "gpu_report.json"
    report: dict[str, Any] = {**facts, "steps": {**earlier_steps(path, facts["commit"]), "build": built}}
    for name, (command, limit) in steps(out).items():
        if report["steps"].get(name, {}).get("status") == "ok":
            print(f"{name}: done before", flush=True)
            continue
        left = BUDGET_SECONDS - (time.perf_counter() - begin)
        step = run(command, min(limit, left)) if left > 10 else {"status": "not run: out of time", "seconds": 0.0}
        report["steps"][name] = step
        print(f"{name}: {said(step)}", flush=True)
        write_json(path, report)
    print(path)
    if bad := [name for name, step in report["steps"].items() if step["status"] != "ok"]:
        raise RuntimeError(f"not well: {', '.join(bad)}")


def said(step: dict[str, Any]) -> str:
    """One line about a step: for one that went wrong, with the last line of its output."""
    line = f"{step['status']}, {step['seconds']} s {step.get('tests', '')}".rstrip()
    output = step.get("output", "").strip()
    return line if step["status"] == "ok" or not output else f"{line}: {output.splitlines()[-1]}"


def earlier_steps(path: Path, commit: str) -> dict[str, dict[str, Any]]:
    """The steps of a report that was begun at this commit.

    Raises:
        ValueError: there is a report that cannot be read.
    """
    if not path.exists():
        return {}
    try:
        earlier = json.loads(path.read_text())
        return earlier["steps"] if earlier["commit"] == commit != "unknown" else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, delete it to begin again: {error}") from error
