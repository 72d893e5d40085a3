"""No kernel needs more than csrc/cuda/budget.json allows, and no op costs more. No GPU is needed for any of this."""

from __future__ import annotations

import ptx
import pytest
from counting import budget, sass

AGAIN = "if it is meant: python tests/budget.py"
SOURCES = sorted(path.stem for path in ptx.SOURCES.glob("*.cu"))

pytestmark = pytest.mark.skipif(ptx.nvcc() is None, reason="not run: no nvcc")


def skip_unless_comparable(*names: str) -> None:
    versions = {"nvcc": ptx.nvcc_version, "nvdisasm": sass.nvdisasm_version}
    for name in names:
        allowed, here = budget.read()[name], versions[name]()
        if here != allowed:
            pytest.skip(f"not run: the budget is that of {name} {allowed}; here is {here}")


@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_exceeds_its_budget(source: str) -> None:
    (path,) = (path for path in ptx.library_ptx() if path.stem == source)
    found = budget.kernels(path)
    for name, kernel in found.items():
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
    skip_unless_comparable("nvcc")
    worse = list(budget.worse(found, budget.read()["kernels"].get(source, {}), source))
    assert not worse, "\n".join([*worse, AGAIN])


@pytest.mark.skipif(sass.nvdisasm() is None, reason="not run: no package nvidia-cuda-nvdisasm")
def test_no_op_exceeds_its_budget() -> None:
    skip_unless_comparable("nvcc", "nvdisasm")
    found = {case.name: figures for case, figures in budget.measured()}
    worse = list(budget.worse(found, budget.read()["ops"], "ops"))
    assert not worse, "\n".join([*worse, AGAIN])


def test_every_budget_has_its_source() -> None:
    assert sorted(budget.read()["kernels"]) == SOURCES


def test_what_is_worse_is_named() -> None:
    allowed = {"instructions": 0.2, "bytes_in_flight": 40000, "kernels": {"pool": {"registers": 64}}}
    assert not list(budget.worse({**allowed, "instructions": 0.1, "bytes_in_flight": 50000}, allowed, "op"))
    found = {"instructions": 0.21, "bytes_in_flight": 39999, "kernels": {"pool": {"registers": 65}}}
    assert list(budget.worse(found, allowed, "op")) == [
        "op: instructions 0.21, budget 0.2",
        "op: bytes_in_flight 39999, budget 40000",
        "op: kernels: pool: registers 65, budget 64",
    ]
    assert list(budget.worse({**allowed, "kernels": {}}, allowed, "op")) == ["op: kernels: expected pool, got "]
