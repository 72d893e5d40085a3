"""What was built, what is here, and what is missing: `build_info()` and the text of `blt-kernels doctor`."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ._library import LIBRARY, build_record
from .backend import available_backends, cuda_problem
from .version import __version__

PCI_DEVICES = Path("/sys/bus/pci/devices")


def build_info() -> dict[str, Any]:
    """How the compiled library was built and what it finds here.

    Returns:
        A JSON-able dict: `version`; `library` (path); `build` (compiler, flags, CPU capabilities with their flags,
        torch headers and oldest torch, backends); `backends` (usable now); `cpu_capability` (the instruction set in
        use: "default", "avx2" or "avx512"); `torch`, `python`, `platform`, `threads`, `devices`.
    """
    devices = [f"cpu ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return {
        "version": __version__,
        "library": str(LIBRARY),
        "build": build_record(),
        "backends": list(available_backends()),
        "cpu_capability": torch.ops.blt_kernels.cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": devices,
    }


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, with or without a driver, and whatever torch was built for."""
    if torch.cuda.is_available() or any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    # Without a driver the GPU is still on the PCI bus: a display controller (class 0x03) of NVIDIA's.
    for device in PCI_DEVICES.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def problems() -> list[str]:
    """One line for each thing that makes the library slower or smaller here than it could be, with its remedy.

    The CUDA backend is missing only where there is a GPU that could use it.
    """
    info = build_info()
    found = []
    built_for = info["build"].get("version")
    if built_for != __version__:
        found.append(
            f"the compiled library is version {built_for}, the Python package {__version__}: rebuild with "
            "`pip install -e . --no-build-isolation`"
        )
    if info["cpu_capability"] == "default" and platform.machine() == "x86_64":
        found.append(
            "the CPU kernels use baseline instructions: this processor has no AVX2, or BLT_KERNELS_CPU_CAPABILITY "
            "forces them"
        )
    if "cpu" not in info["backends"]:
        found.append("backend cpu is missing: the CPU kernels are always built: reinstall blt_kernels")
    if "cuda" not in info["backends"] and has_nvidia_gpu():
        found.append(f"backend cuda is missing: {cuda_problem()}")
    if "cuda" in info["backends"]:
        for i in range(torch.cuda.device_count()):
            if (problem := cuda_problem(torch.device("cuda", i))) is not None:
                found.append(f"backend cuda cannot serve cuda:{i}: {problem}")
    return found


def report() -> str:
    """`build_info()` and `problems()` as text, for a terminal or a bug report."""
    lines = []
    for key, value in build_info().items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {name}: {item}" for name, item in value.items()]
        else:
            lines.append(f"{key}: {value}")
    missing = problems()
    lines += ["", "nothing is missing" if not missing else "missing:"]
    lines += [f"  - {line}" for line in missing]
    return "\n".join(lines)
