"""Times an op beside its baselines and beside a copy of the same number of bytes, all in one interleaved run.

A benchmark is a module `benchmarks/<op>.py` with a generator of cases:

    def cases(setting: Setting) -> Iterator[Case]:
        x = setting.randn(1, 4096, 1024)
        yield Case(
            name="forward",                                  # with the shapes, unique within the module
            shapes={"N": 4096, "D": 1024},                   # whatever says what was run
            variants={"ours": lambda: op(x), "reference": lambda: reference.op(x)},
            bytes=...,                                       # each input read once + each output written once
            check=lambda: torch.testing.assert_close(op(x), reference.op(x)),
        )

A case is built, checked, timed and dropped before the next, so closures hold its tensors. `check` runs before any
timing and raises when the results are wrong: no speed is reported for a wrong result. Variants are called without
arguments; the first is the op under test.

On the CPU every module runs twice, in processes of its own: in the measuring environment (threads bound to cores;
freed memory kept by malloc, so that outputs are not page-faulted in on every call) and in the default one. Every
variant is timed once a round, in turn, so that what disturbs the machine disturbs all alike; tables have medians over
rounds and the quartiles. "copy" is `dst.copy_(src)` of half the case's bytes, which reads plus writes that many.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config

import blt_kernels

from ..timing import Measured, on_device, peak_bytes

# A backward graph is built once and run again and again, which donated buffers forbid.
torch._functorch.config.donated_buffer = False
# Beyond its limit of shapes torch.compile would quietly run the baseline eagerly.
torch._dynamo.config.recompile_limit = 1000
torch._dynamo.config.fail_on_recompile_limit_hit = True

OPS = (
    "segment_logits",
    "linear_entropy",
    "patch_pool",
    "patch_gather",
    "encoder_cross_attention",
    "decoder_cross_attention",
    "hash_ngram_embedding",
)
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "measuring": {
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": "cores",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    },
    "default": {},
}
REPOSITORY = Path(__file__).resolve().parents[2]


Tensors = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how much: the device, the dtype (fp32 on the CPU, bf16 on a GPU), and whether only the short list."""

    device: torch.device
    quick: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def sizes(self) -> tuple[int, ...]:
        """Bytes of text in a row: the sweep over N. A GPU gets a size that moves a gigabyte, too."""
        if self.device.type == "cpu":
            return (16384,) if self.quick else (1024, 4096, 16384, 65536)
        return (65536, 1 << 19) if self.quick else (1024, 4096, 16384, 65536, 1 << 19)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    shapes: dict[str, Any]
    variants: dict[str, Callable[[], Any]]
    bytes: int
    check: Callable[[], None] | None = None
    graph: bool = True  # on a GPU, replay a CUDA graph; False for what waits for the device

    @property
    def label(self) -> str:
        return label(self.name, self.shapes)


def forward_and_backward(
    shapes: dict[str, Any],
    functions: dict[str, Callable[..., torch.Tensor]],
    inputs: tuple[torch.Tensor, ...],
    *,
    forward_bytes: int,
    backward_bytes: int,
    forward_only: tuple[str, ...] = (),
    comparable: torch.Tensor | None = None,
) -> Iterator[Case]:
    """The two cases of an op: its result without a graph, and the gradients of all `inputs` with the graph built.

    Args:
        functions: of `inputs`; the first is the op under test, against which the others' results are checked. NaN in
            theirs counts as 0: that is what a softmax over nothing is under a dense mask.
        forward_only: the functions without a backward pass that could be compared.
        comparable: bool, of the shape of the first input: where its gradients must agree; None: everywhere.
    """

    def forward(fn: Callable[..., torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return fn(*inputs)

    def check_forward() -> None:
        ours, *others = (forward(fn) for fn in functions.values())
        for other in others:
            assert_close(ours, other.nan_to_num(0), inputs)

    variants: dict[str, Callable[[], Any]] = {name: partial(forward, fn) for name, fn in functions.items()}
    yield Case("forward", shapes, variants, forward_bytes, check_forward)

    leaves = [x.requires_grad_() for x in inputs]
    outputs = {name: fn(*leaves) for name, fn in functions.items() if name not in forward_only}
    grad = torch.randn_like(next(iter(outputs.values())))

    def backward(out: torch.Tensor) -> Tensors:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def check_backward() -> None:
        ours, *others = (backward(out) for out in outputs.values())
        for other in others:
            for i, (a, b) in enumerate(zip(ours, other, strict=True)):
                where = slice(None) if comparable is None or i > 0 else comparable
                assert_close(a[where], b.nan_to_num(0)[where], inputs)

    variants = {name: partial(backward, out) for name, out in outputs.items()}
    yield Case("backward", shapes, variants, backward_bytes, check_backward)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, inputs: Iterable[torch.Tensor]) -> None:
    """For results that were added up in another order: entry by entry, with narrow `inputs` by their norms."""
    narrow = [x.dtype for x in inputs if x.dtype in (torch.bfloat16, torch.float16)]
    if not narrow:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        return
    error = torch.linalg.vector_norm(ours.float() - theirs.float())
    allowed = 0.05 * torch.linalg.vector_norm(theirs.float()) + 1e-3 * ours.numel() ** 0.5  # all may be 0
    assert error <= allowed, f"error {error:.3g} against a baseline in {narrow[0]}, at most {allowed:.3g} allowed"


def label(name: str, shapes: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in shapes.items())])


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run: see `blt-kernels bench --help`."""

    device: str = "cpu"
    quick: bool = False
    rounds: int = 15
    case: str = ""


def measure(op: str, options: Options, environments: Iterable[str]) -> dict[str, Any]:
    """Runs `benchmarks/<op>.py` in each environment, in processes of their own: the document that is kept as JSON.

    On the CPU the default environment gets the short list, unless cases are named: it is there to show what the other
    one hides.
    """
    controlled = {name for variables in ENVIRONMENTS.values() for name in variables}
    inherited = {name: value for name, value in os.environ.items() if name not in controlled}
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for environment in environments:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            second = environment == "default" and options.device == "cpu" and not options.case
            request = json.dumps(
                {"op": op, "path": str(path), **dataclasses.asdict(options)} | ({"quick": True} if second else {})
            )
            command = [sys.executable, "-m", "benchmarks.ops.worker", request]
            done = subprocess.run(command, env=inherited | ENVIRONMENTS[environment], cwd=REPOSITORY)
            if done.returncode != 0:
                raise RuntimeError(f"{op}: its benchmark failed in the {environment} environment, as said above")
            answer = json.loads(path.read_text())
            facts = facts or answer["facts"]
            if options.device == "cpu":  # a bound process sees one core
                facts["device"] = _device_name(torch.device("cpu"))
            rows += [{"environment": environment, **row} for row in answer["rows"]]
    if not rows:
        raise ValueError(f"bench: --case: expected part of a case of {op}, got {options.case!r}")
    return {"op": op, **facts, "quick": options.quick, "environments": ENVIRONMENTS, "rows": rows}


def run(cases: Iterable[Case], device: torch.device, rounds: int, only: str = "") -> list[dict[str, Any]]:
    """Checks and times every case whose label contains `only`: one row per case and variant."""
    rows = []
    with on_device(device):
        for case in cases:
            if only not in case.label:
                continue
            if case.check is not None:
                case.check()
            timed = _time_case(case, device, rounds)
            print(f"  {case.label}: {_time(timed[0]['seconds'])}", file=sys.stderr)
            rows += timed
            del case
            gc.collect()
    return rows


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


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers are measured on."""
    facts: dict[str, Any] = {
        "device": _device_name(device),
        "dtype": str(Setting(device).dtype).removeprefix("torch."),
        "cpu_capability": torch.ops.blt_kernels.cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "blt_kernels": blt_kernels.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
    if importlib.util.find_spec("transformers") is not None:
        facts["transformers"] = importlib.metadata.version("transformers")
    return facts


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text())):
        model = match[1]
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def _commit() -> str:
    git = ["git", "-C", str(REPOSITORY)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return (commit or "unknown") + ("+changes" if dirty.stdout else "")


def device_slug(device: str) -> str:
    """The folder of a device's results: "AMD EPYC, 2 cores" -> "amd-epyc-2-cores"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def print_table(document: dict[str, Any]) -> None:
    print(
        f"\n{document['op']} on {document['device']} ({document['dtype']}, {document['cpu_capability']}, "
        f"{document['threads']} threads), torch {document['torch']}, commit {document['commit'][:12]}"
    )
    columns = ("environment", "case", "variant", "median", "quartiles", "GB/s", "of copy", "x slower", "peak MB")
    table: list[tuple[str, ...]] = [columns]
    for row in document["rows"]:
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
                f"{row['peak_bytes'] / 1e6:.1f}",
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
