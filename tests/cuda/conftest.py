"""The CUDA ops on host threads (csrc/testing; no GPU, no nvcc) and, where there is one, on a GPU."""

from __future__ import annotations

from typing import Any

import emulation
import pytest
import torch
from gpu import GPUOps, has_gpu


@pytest.fixture(scope="session", params=["host", "gpu"])
def cuda_ops(request: pytest.FixtureRequest) -> Any:
    if request.param == "host":
        return emulation.ops()
    if not has_gpu():
        pytest.skip("not run: no GPU")
    return GPUOps()


@pytest.fixture
def gpu() -> torch.device:
    if not has_gpu():
        pytest.skip("not run: no GPU")
    return torch.device("cuda")
