"""Faults of kernels that the interpreter of PTX refuses, each shown by a kernel that has it (csrc/testing/broken.cu)
and that runs without it. What it refuses in the text of PTX is in test_ptx_interpreter.py."""

from __future__ import annotations

import re
from typing import Any

import ptx
import pytest
import torch
from emulation import REPOSITORY

THREADS = 64
# Kernel, blocks, the instruction that is refused, and why.
FAULTS = [
    ("misaligned", 1, "st.global", "misaligned: 8 bytes at address"),
    ("outside", 1, "st.global", "outside the tensors of the call"),
    ("beyond_shared", 1, "st.shared", "beyond the 256 bytes of shared memory: 4 bytes at 256"),
    ("unwritten", 1, "ld.shared", "reads shared memory that was never written: 4 bytes at 0"),
    ("race_of_warps", 1, "st.shared", "two warps touch a byte of shared memory between barriers"),
    ("race_of_lanes", 1, "ld.shared", "two lanes of a warp touch a byte of shared memory without bar.warp.sync"),
    ("race_of_blocks", 2, "ld.global", "two blocks touch a byte of global memory"),
    ("barrier_of_some_lanes", 1, "bar.sync", "a barrier that only a part of the block reaches"),
    ("barrier_of_one_warp", 1, "bar.sync", "a barrier that only a part of the block reaches"),
    ("barrier_after_return", 1, "bar.sync", "a barrier after a thread of the block has left"),
    ("inactive_lane", 1, "shfl.sync.idx", "lane 0 asks lane 25, which is inactive"),
    ("missing_lanes", 1, "shfl.sync.idx", "waits for lanes that are elsewhere"),
    ("local_memory", 1, ".local", "local memory, which no kernel may use"),
    ("unknown_opcode", 1, "dp4a", "unknown opcode dp4a.s32.s32"),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if ptx.nvcc() is None:
        pytest.skip("not run: no nvcc")
    (path,) = ptx.compile_ptx([REPOSITORY / "csrc" / "testing" / "broken.cu"], tmp_path_factory.mktemp("broken"))
    ops = ptx.emulation.ops()
    ops.ptx_load(str(path))
    return ops


def run(ops: Any, name: str, blocks: int, is_broken: bool) -> torch.Tensor:
    x = torch.arange(blocks * THREADS, dtype=torch.float32)
    kernel = f"_Z{len(name)}{name}ILb{int(is_broken)}EEvPf"
    ops.ptx_run(kernel, blocks, THREADS, 4 * THREADS if name == "beyond_shared" else 0, [x])
    return x


@pytest.mark.parametrize(("name", "blocks", "instruction", "reason"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_refused(broken: Any, name: str, blocks: int, instruction: str, reason: str) -> None:
    with pytest.raises(
        RuntimeError, match=rf"ptx: void {name}<true>\(float\*\): .*`[^`]*{re.escape(instruction)}"
    ) as error:
        run(broken, name, blocks, is_broken=True)
    assert reason in str(error.value)
    run(broken, name, blocks, is_broken=False)
    assert f"_Z{len(name)}{name}ILb0EEvPf" in broken.ptx_launched().split()


def test_every_broken_kernel_has_a_case(broken: Any) -> None:
    kernels = {name for name in broken.ptx_kernels().split() if name.startswith("_Z") and "ILb" in name}
    names = {re.match(r"void (\w+)<(?:true|false)>\(float\*\)$", name) for name in ptx.readable(sorted(kernels))}
    assert {match[1] for match in names if match} == {fault[0] for fault in FAULTS}
