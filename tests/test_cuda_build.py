"""The CUDA backend as a build product: no GPU is needed for any of this. Its budget is in tests/cuda."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

import blt_kernels

ROOT = Path(__file__).resolve().parent.parent

needs_nvcc = pytest.mark.skipif(
    "cuda" not in blt_kernels.build_info()["build"]["backends"], reason="built without CUDA: there is no nvcc here"
)


@needs_nvcc
def test_every_cuda_op_is_registered() -> None:
    """What has a source for CUDA is registered there, forward and backward, and nothing is registered twice."""
    registered = {
        schema.name.removeprefix("blt_kernels::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("blt_kernels::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA")
    }
    written = set()
    for path in (ROOT / "csrc" / "ops" / "cuda").glob("*.cpp"):
        written |= set(re.findall(r'm\.impl\("(\w+)"', path.read_text()))
    assert written and registered == written


@needs_nvcc
def test_the_stream_symbol_is_weak() -> None:
    """A torch without CUDA lacks it, and the library loads there all the same."""
    symbols = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", blt_kernels.build_info()["library"]],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert re.search(r"\bw aoti_torch_get_current_cuda_stream\b", symbols)
