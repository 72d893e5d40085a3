"""The functions that kernels are made of, by themselves (csrc/testing/device_helpers.cpp)."""

from __future__ import annotations

import importlib.util
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from emulation import REPOSITORY, build

NAME = "blt_device_helpers"
TYPES = [("bfloat16", torch.bfloat16), ("float16", torch.float16)]


@pytest.fixture(scope="module")
def helpers() -> ModuleType:
    pybind11 = pytest.importorskip("pybind11", reason="not run: no pybind11")
    python = sysconfig.get_path("include")
    if not (Path(python) / "Python.h").exists():
        pytest.skip("not run: no headers of Python")
    folder = REPOSITORY / "build" / "device_helpers"
    build(folder, NAME, f"-DBLT_PYTHON_INCLUDES={python};{pybind11.get_include()}")
    spec = importlib.util.spec_from_file_location(NAME, folder / f"{NAME}.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def every_16_bits() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16)


def as_torch(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(values.view(np.int16)).view(dtype)


def difficult_floats() -> torch.Tensor:
    """Numbers with ties, overflow and subnormals of 16-bit types among them."""
    torch.manual_seed(0)
    exponents = torch.randint(-140, 128, (20000,))
    ties = torch.randint(0, 1 << 14, (20000,)).float() * 2.0**-13
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 65504, 65519.996, 65520, 3.4e38])
    return torch.cat([torch.ldexp(1 + ties, exponents), -torch.randn(20000), special])


@pytest.mark.parametrize(("name", "dtype"), TYPES)
def test_conversions(helpers: ModuleType, name: str, dtype: torch.dtype) -> None:
    values = every_16_bits()
    widened = torch.from_numpy(getattr(helpers, f"widen_{name}")(values))
    torch.testing.assert_close(widened, as_torch(values, dtype).float(), rtol=0, atol=0, equal_nan=True)
    x = difficult_floats()
    narrowed = as_torch(getattr(helpers, f"narrow_{name}")(x.numpy()), dtype)
    torch.testing.assert_close(narrowed, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "dtype"), TYPES)
def test_pairs(helpers: ModuleType, name: str, dtype: torch.dtype) -> None:
    x = difficult_floats()
    low, high = x, x.flip(0)
    pairs = getattr(helpers, f"pair_of_{name}")(low.numpy(), high.numpy())
    for part, expected in (("low", low), ("high", high)):
        got = torch.from_numpy(getattr(helpers, f"{part}_of_{name}")(pairs))
        torch.testing.assert_close(got, expected.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    halves = torch.stack([low, high], -1).to(dtype)
    other = halves.roll(7, 0)
    others = np.roll(pairs, 7)
    for which, reference in (("max", torch.maximum), ("min", torch.minimum)):
        got = getattr(helpers, f"{which}_or_nan_pair_{name}")(pairs, others)
        got = as_torch(got.view(np.uint16), dtype).view(-1, 2)
        torch.testing.assert_close(got, reference(halves, other), rtol=0, atol=0, equal_nan=True)


def test_maxima(helpers: ModuleType) -> None:
    x = difficult_floats()
    y = x.roll(11)
    for function, reference in ((helpers.max_or_nan, torch.maximum), (helpers.min_or_nan, torch.minimum)):
        got = torch.from_numpy(function(x.numpy(), y.numpy()))
        torch.testing.assert_close(got, reference(x, y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("function", "reference"),
    [("exp2_approx", torch.exp2), ("log2_approx", torch.log2), ("reciprocal_approx", torch.reciprocal)],
)
def test_special_functions(
    helpers: ModuleType, function: str, reference: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.rand(1000) * 100 + 0.01
    got = torch.from_numpy(getattr(helpers, function)(x.numpy()))
    torch.testing.assert_close(got.double(), reference(x.double()), rtol=2**-22, atol=2**-22)


def test_warp_reductions(helpers: ModuleType) -> None:
    x = np.random.default_rng(0).normal(size=32)
    assert np.array_equal(helpers.warp_max(x), np.full(32, np.float32(x.max())))
    np.testing.assert_allclose(helpers.warp_sum(x), np.full(32, x.sum()), rtol=1e-14)
    x[13] = np.nan
    assert np.isnan(helpers.warp_max(x)).all() and np.isnan(helpers.warp_sum(x)).all()
    with pytest.raises(ValueError, match="expected one dimension with 32 elements"):
        helpers.warp_sum(x[1:])


def test_scans(helpers: ModuleType) -> None:
    x = np.random.default_rng(0).integers(0, 1 << 40, 256)
    assert np.array_equal(helpers.warp_scan_sum(x[:32]), x[:32].cumsum())
    before, total = helpers.block_scan_sum(x)
    assert np.array_equal(before, x.cumsum() - x) and np.array_equal(total, np.full(256, x.sum()))
    before, total = helpers.block_scan_max(x)
    assert np.array_equal(before, np.append(0, np.maximum.accumulate(x)[:-1]))
    assert np.array_equal(total, np.full(256, x.max()))
