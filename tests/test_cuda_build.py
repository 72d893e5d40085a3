"""The CUDA backend as a build product: no GPU is needed for any of this."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import blt_kernels

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
BUDGET = ROOT / "csrc" / "cuda" / "budget.json"
SM = "sm_90a"

needs_nvcc = pytest.mark.skipif(
    "cuda" not in blt_kernels.build_info()["build"]["backends"], reason="built without CUDA: there is no nvcc here"
)


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    assert found is not None
    return found


def nvcc_version() -> str:
    text = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"V([0-9.]+)", text)[1]


def resources(source: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes and static shared memory of every kernel of a file, as ptxas reports them."""
    command = [nvcc(), "-std=c++20", "-O3", f"-arch={SM}", "-cubin", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        [*command, "-o", str(folder / source.stem), str(source)], check=True, capture_output=True, text=True
    )
    names = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    if not names:
        return {}
    plain = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    used = re.findall(r"Used (\d+) registers([^\n]*)", done.stderr)
    assert len(names) == len(spills) == len(used)
    kernels = {}
    for name, spill, (registers, rest) in zip(plain, spills, used, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        short = re.sub(r"blt::(cuda::)?|^void |\([^()]*\)$", "", name)
        kernels[short] = {
            "registers": int(registers),
            "spilled": sum(map(int, spill)),
            "shared": int(shared[1]) if shared else 0,
        }
    return kernels


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_exceeds_its_budget(source: Path, tmp_path: Path) -> None:
    budget = json.loads(BUDGET.read_text())
    found = resources(source, tmp_path)
    for name, kernel in found.items():
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
    if nvcc_version() != budget["nvcc"]:
        pytest.skip(f"the budget is that of nvcc {budget['nvcc']}; here is {nvcc_version()}")
    allowed = budget["kernels"].get(source.stem, {})
    again = f"if it is meant: python {Path(__file__).relative_to(ROOT)}"
    assert found.keys() == allowed.keys(), f"kernels of {source.name} came or went; {again}"
    for name, kernel in found.items():
        for resource, used in kernel.items():
            assert used <= allowed[name][resource], (
                f"{name}: {resource} {used}, budget {allowed[name][resource]}; {again}"
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


def write_budget() -> None:
    folder = ROOT / "build" / "budget"
    folder.mkdir(parents=True, exist_ok=True)
    kernels = {source.stem: resources(source, folder) for source in SOURCES}
    BUDGET.write_text(json.dumps({"nvcc": nvcc_version(), "sm": SM, "kernels": kernels}, indent=1) + "\n")


if __name__ == "__main__":
    write_budget()
