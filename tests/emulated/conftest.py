"""The CUDA kernels on host threads, compared with the references on small ragged cases. No GPU, no nvcc."""

from __future__ import annotations

from typing import Any

import emulation
import pytest


@pytest.fixture(scope="session")
def emulated() -> Any:
    return emulation.ops()
