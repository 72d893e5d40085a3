"""The CUDA ops in up to three modes: the host twins of their kernels (csrc/testing/emulator.h; no GPU, no nvcc), the
compiled kernels in an interpreter (csrc/testing/ptx; no GPU), and a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emulation
import ptx
import pytest
import torch
from gpu import GPUOps, has_gpu


@pytest.fixture(scope="session", params=["emulated", "ptx", "gpu"])
def cuda_ops(request: pytest.FixtureRequest) -> Any:
    if request.param == "emulated":
        return emulation.ops()
    if request.param == "ptx":
        return ptx.PTXOps() if ptx.nvcc() else pytest.skip("not run: no nvcc")
    return GPUOps() if has_gpu() else pytest.skip("not run: no GPU")


@pytest.fixture
def gpu() -> torch.device:
    if not has_gpu():
        pytest.skip("not run: no GPU")
    return torch.device("cuda")


DESELECTED = pytest.StashKey[list[pytest.Item]]()
LAST = ("test_ptx_coverage.py", "test_cuda_budget.py")


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items:
        items[0].config.stash.setdefault(DESELECTED, []).extend(items)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test that asks which kernels were launched runs after the others, and before those that only count."""
    items.sort(key=lambda item: LAST.index(item.path.name) if item.path.name in LAST else -1)


def interpreted(items: Sequence[pytest.Item]) -> set[Path]:
    """The files of those of the items that run in the mode ptx."""
    return {
        item.path
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("cuda_ops") == "ptx"
    }


@pytest.fixture(scope="session")
def whole_folder(request: pytest.FixtureRequest) -> bool:
    """Whether every test of this folder that has the mode ptx runs in it in this session."""
    files = {path for path in Path(__file__).parent.glob("test_*.py") if "(cuda_ops" in path.read_text()}
    deselected = request.config.stash.get(DESELECTED, [])
    return files <= interpreted(request.session.items) and not interpreted(deselected)
