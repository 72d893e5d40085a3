"""Loads the compiled library once, and explains in one message why it cannot be loaded."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libblt_kernels.so")
BUILD_RECORD = Path(__file__).with_name("build_record.json")
MIN_TORCH = (2, 10)


def build_record() -> dict:
    """What CMake wrote beside the library: compiler, flags, architectures, torch headers."""
    try:
        record = json.loads(BUILD_RECORD.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _explain(problem: str, remedy: str) -> ImportError:
    record = build_record()
    if record:
        built = (
            f"blt_kernels {record['version']} for {record['system']} {record['processor']}, "
            f"backends {', '.join(record['backends'])}, torch headers {record['torch_headers']} "
            f"(stable ABI, needs torch >= {record['torch_target']})"
        )
    else:
        built = "nothing: no build record beside the package"
    return ImportError(
        f"blt_kernels: {problem}\n"
        f"  built:      {built}\n"
        f"  here:       torch {torch.__version__}, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}\n"
        f"  what to do: {remedy}"
    )


def load() -> None:
    """Registers the compiled ops as `torch.ops.blt_kernels.*`. Raises ImportError with the reason and the remedy."""
    build = (
        "in a checkout run `pip install -e . --no-build-isolation`; otherwise reinstall with `pip install blt_kernels`"
    )
    if _torch_version() < MIN_TORCH:
        raise _explain(f"torch {torch.__version__} is too old", "pip install 'torch>=2.10'")
    if not LIBRARY.exists():
        raise _explain(f"the compiled library {LIBRARY.name} is missing", build)
    try:
        torch.ops.load_library(LIBRARY)
    except Exception as error:
        raise _explain(f"the compiled library cannot be loaded: {error}", build) from error


load()
