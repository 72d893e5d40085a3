"""`python -m benchmarks gpu`: everything that only a GPU can say, in one command, without a network, in under nine
minutes.

Builds the library for the GPU that is there and against the torch that is there (2.10 or newer), or takes one that was
built elsewhere; then runs, in this order, tests/cuda on the GPU, the short list of every op's benchmark, and
compute-sanitizer's memcheck and racecheck on a small ragged case of every op. What each step said goes to
<out>/<device>/gpu_report.json as it ends; the results of benchmarks lie beside it, each as far as it has come after
every case. However the command ends, --archive puts that folder into one file, for machines that give back only a few.
Run again with the same sources and the same --out, it goes on with the steps that are not done; --steps names the steps
to run whatever was done before.

It needs torch, nvcc, and for the build setuptools, cmake and ninja. The tests and the sanitizers need pytest and
hypothesis too; where they or compute-sanitizer are missing, these steps say so and the others run.

--dry walks through all of it on a machine without a GPU: the build and the tests are planned and not run, the
benchmarks and the sanitizers' cases run on the CPU in tiny sizes, and every result is read back.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# None of these imports our own library, which is not built yet.
from .machine import REPOSITORY, describe_machine, device_name
from .ops import OPS
from .store import read, result_path

BUDGET_SECONDS = 8.5 * 60
# Characters of a step's output that are kept: of one that went wrong, enough for every failed test.
TAIL, FAILED_TAIL = 4000, 100_000
PACKAGE = REPOSITORY / "blt_kernels"
LIBRARY_FILES = ("libblt_kernels.so", "build_record.json")
SOURCES = ("csrc/**/*", "blt_kernels/**/*.py", "benchmarks/**/*.py", "tests/**/*.py", "CMakeLists.txt", "setup.py")
STEPS = ("tests", *OPS, "memcheck", "racecheck")


@dataclasses.dataclass(frozen=True)
class Step:
    """A program that runs, and what must be there afterwards.

    Attributes:
        limit: seconds after which it is stopped.
        environment: variables that it gets beside those of this process.
        result: the result of a benchmark that it writes, which is read back.
    """

    command: list[str]
    limit: int
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    result: Path | None = None


def steps(out: Path, dry: bool) -> dict[str, Step]:
    """The steps after the build, in order of what matters most."""
    patience = 10 if dry else 1
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    if dry:
        pytest.append("--collect-only")
    made = {"tests": Step([*pytest, "tests/cuda", "-k", "gpu and not rehearsal"], 240 * patience)}
    # In a rehearsal nothing is compiled: that takes minutes, and the eager form is the same function.
    where = ["--tiny", "--rounds", "1"] if dry else ["--device", "cuda", "--rounds", "9"]
    environment = {"TORCHDYNAMO_DISABLE": "1"} if dry else {}
    device = device_name(torch.device("cpu" if dry else "cuda"))
    for op in OPS:
        command = [sys.executable, "-m", "benchmarks", "ops", op, "--quick", *where, "--out", str(out)]
        made[op] = Step(command, 150 * patience, environment, result_path(out, device, op))
    cases = [sys.executable, "tests/sanitize.py", "cases", "cpu" if dry else "gpu"]
    for tool in ("memcheck", "racecheck"):
        # Tensors of a cached block lie side by side in memory of torch's own, where memcheck sees no bounds.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        made[tool] = Step([*([] if dry else sanitizer(tool)), *cases], 120 * patience, environment)
    return made


def sanitizer(tool: str) -> list[str]:
    """compute-sanitizer on our own kernels alone: it slows others down a hundredfold, and theirs are not our matter."""
    folders = [os.environ[name] + "/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders, "/usr/local/cuda/bin"])
    program = shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"
    # "3blt4cuda" is blt::cuda, the namespace of every kernel, as it stands in their mangled names.
    return [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=3blt4cuda"]


def build(architecture: str, dry: bool) -> Step:
    """setup.py, which finds CMake and ninja. A rehearsal only has it read the options."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {"BLT_BUILD_CUDA": "1", "BLT_CUDA_ARCHITECTURES": architecture}
    return Step([*command, "--help"] if dry else command, 300, environment)


def architecture_here() -> str:
    """The one architecture to build for: that of the GPU, under the name by which CMakeLists.txt lists it."""
    major, minor = torch.cuda.get_device_capability()
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def take_library(library: Path, dry: bool) -> dict[str, Any]:
    """Puts a library that was built elsewhere, and the record beside it, where the package looks for them.

    Raises:
        ValueError: one of the two is missing, or it was built without CUDA.
    """
    for name in LIBRARY_FILES:
        if not library.with_name(name).is_file():
            raise ValueError(f"--library: expected {' and '.join(LIBRARY_FILES)} in one folder, got {library}")
    record = json.loads(library.with_name(LIBRARY_FILES[1]).read_text())
    if not record["cuda"]:
        raise ValueError(f"--library: expected one with CUDA kernels, got {library}, which was built without them")
    for name in () if dry or library.parent == PACKAGE else LIBRARY_FILES:
        partial = PACKAGE / f".{name}.partial"  # a process that has loaded the present one keeps it
        shutil.copyfile(library.with_name(name), partial)
        partial.replace(PACKAGE / name)
    return {"status": "ok", "seconds": 0.0, "output": f"taken from {library}"}


def run(step: Step, limit: float | None = None) -> dict[str, Any]:
    """Runs one step, and returns whether it went well, its time, and the end of its output."""
    limit = step.limit if limit is None else min(limit, step.limit)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"} | step.environment
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        try:
            # A session of its own: what it has started must not go on beside the next step.
            child = subprocess.Popen(
                step.command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        except FileNotFoundError as error:
            return {"status": "not run", "seconds": 0.0, "output": str(error)}
        try:
            child.wait(limit)
            status = "ok" if child.returncode == 0 else f"exit {child.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    done: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - begin, 1)}
    if counts := re.findall(
        r"(\d+)(?:/\d+ tests)? (passed|failed|skipped|error|tests collected|collected)", output[-400:]
    ):
        done["tests"] = {what.removeprefix("tests "): int(count) for count, what in counts}
        if status == "ok" and not done["tests"].keys() & {"passed", "collected"}:
            done["status"] = "nothing was tested"
    if status == "ok" and step.result is not None:
        try:
            read(step.result)
        except ValueError as error:
            done["status"] = f"its result cannot be read: {error}"
    return done | {"output": output[-(TAIL if done["status"] == "ok" else FAILED_TAIL) :]}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "benchmarks" / "results", help="default: benchmarks/results"
    )
    parser.add_argument("--commit", help="what the results name as their commit, where there is no .git")
    parser.add_argument("--steps", nargs="+", choices=STEPS, metavar="STEP", help=f"some of: {', '.join(STEPS)}")
    parser.add_argument(
        "--library", type=Path, help="a libblt_kernels.so, with its build_record.json: nothing is built"
    )
    parser.add_argument("--archive", type=Path, help="a .tar.gz for everything that lies under --out for this device")
    parser.add_argument("--dry", action="store_true", help="rehearse on a machine without a GPU")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        raise RuntimeError("not run: torch sees no GPU here")
    if options.commit:
        os.environ["BLT_KERNELS_COMMIT"] = options.commit  # for describe_machine, here and in the steps
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops the report stops its step
    library = None if options.library is None else options.library.resolve()
    out = options.out.resolve()
    try:
        make_report(out, options.steps, library, options.dry)
    finally:
        if options.archive is not None:
            device = device_name(torch.device("cpu" if options.dry else "cuda"))
            pack(result_path(out, device, "gpu_report").parent, options.archive.resolve())


def pack(folder: Path, archive: Path) -> None:
    """Puts a folder and what is in it into a .tar.gz, whole or not at all. The archive lies outside of the folder."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as file:
        file.add(folder, folder.name)
    partial.replace(archive)


def make_report(out: Path, chosen: Sequence[str] | None, library: Path | None, dry: bool) -> None:
    """Builds, runs the steps and writes the report after each.

    Raises:
        ValueError: `library` cannot be used, or an earlier report cannot be read.
        RuntimeError: the build or a step went wrong; the report says how.
    """
    begin = time.perf_counter()
    device = torch.device("cpu" if dry else "cuda")
    path = result_path(out, device_name(device), "gpu_report")
    sources = hash_of_sources(library)
    report: dict[str, Any] = {"dry": dry, "sources": sources, "steps": earlier_steps(path, sources, dry)}
    built = take_library(library, dry) if library else run(build("90a" if dry else architecture_here(), dry))
    report["steps"]["build"] = built
    print(f"build: {said(built)}", flush=True)
    write(path, report)
    if built["status"] != "ok":
        raise RuntimeError(f"the build failed, {path} has its output: {said(built)}")
    importlib.invalidate_caches()
    report = {**describe_machine(device), "build": json.loads((PACKAGE / LIBRARY_FILES[1]).read_text()), **report}
    made = steps(out, dry)
    for name in chosen or made:
        if not chosen and report["steps"].get(name, {}).get("status") == "ok":
            print(f"{name}: done before", flush=True)
            continue
        # Nobody waits for a rehearsal, and the machine that makes it may be slow.
        left = 10 * BUDGET_SECONDS if dry else BUDGET_SECONDS - (time.perf_counter() - begin)
        done = run(made[name], left) if left > 10 else {"status": "not run: out of time", "seconds": 0.0}
        report["steps"][name] = done
        print(f"{name}: {said(done)}", flush=True)
        write(path, report)
    print(path)
    if bad := [name for name, step in report["steps"].items() if step["status"] != "ok"]:
        raise RuntimeError(f"not well: {', '.join(bad)}")


def write(path: Path, report: dict[str, Any]) -> None:
    """Writes the report whole or not at all, with nothing of the package, which a failed build has not made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def said(step: dict[str, Any]) -> str:
    """One line about a step: for one that went wrong, with the last line of its output."""
    line = f"{step['status']}, {step['seconds']} s {step.get('tests', '')}".rstrip()
    output = step.get("output", "").strip()
    return line if step["status"] == "ok" or not output else f"{line}: {output.splitlines()[-1]}"


def hash_of_sources(library: Path | None) -> str:
    """Of everything that the steps' outcome depends on: the sources, torch, and a library that was built elsewhere."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for pattern in SOURCES for path in REPOSITORY.glob(pattern) if path.is_file()):
        digest.update(f"{path.relative_to(REPOSITORY)} {path.stat().st_size}\n".encode() + path.read_bytes())
    if library is not None and library.is_file():
        digest.update(library.read_bytes())
    return digest.hexdigest()[:16]


def earlier_steps(path: Path, sources: str, dry: bool) -> dict[str, dict[str, Any]]:
    """The steps of a report that was begun with these sources, none where there is no such report.

    Raises:
        ValueError: there is a report that cannot be read.
    """
    if not path.exists():
        return {}
    try:
        earlier = json.loads(path.read_text())
        return earlier["steps"] if (earlier["sources"], earlier["dry"]) == (sources, dry) else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, delete it to begin again: {error}") from error
