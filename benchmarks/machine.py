"""Facts about the machine that measures, as every result file records them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device, the versions and the commit that numbers belong to."""
    import blt_kernels  # here, because `benchmarks gpu` imports this module before it has built the library

    facts: dict[str, Any] = {
        "device": device_name(device),
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


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the CPU with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text())):
        model = match[1]
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def device_slug(name: str) -> str:
    """The folder of a device's results: "AMD EPYC, 2 cores" -> "amd-epyc-2-cores"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str:
    """The commit that BLT_KERNELS_COMMIT names, for a copy of the sources without .git; else git's."""
    if named := os.environ.get("BLT_KERNELS_COMMIT"):
        return named
    git = ["git", "-C", str(REPOSITORY)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return (commit or "unknown") + ("+changes" if dirty.stdout else "")


def measured_on(machine: dict[str, Any]) -> str:
    """What `describe_machine` has found, in the words under a table of results."""
    return f"{machine['device']}, torch {machine['torch']}, commit {machine['commit'][:12]}, {machine['date']}"
