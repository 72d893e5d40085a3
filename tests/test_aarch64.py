"""The CPU sources compile for aarch64, warnings as errors, and one kernel runs there under emulation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
CMAKE = (ROOT / "CMakeLists.txt").read_text()

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="no aarch64-linux-gnu-g++ (Debian's package g++-aarch64-linux-gnu)"
)


def listed(name: str) -> list[str]:
    """The words of `set(name ...)` in CMakeLists.txt."""
    return re.search(rf"\nset\({name}\s([^)]*)\)", CMAKE)[1].split()


def check(source: str, *flags: str) -> None:
    torch_headers = Path(torch.__file__).parent / "include"
    command = [COMPILER, "-std=gnu++20", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    command += [*listed("BLT_WARNINGS"), "-Werror", *flags, f"-I{ROOT / 'csrc'}", "-isystem", str(torch_headers)]
    done = subprocess.run([*command, str(ROOT / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", listed("BLT_CPU_SOURCES"))
def test_kernels_compile(source: str) -> None:
    check(source, "-O1", "-c", "-o", os.devnull, "-DBLT_CPU_CAPABILITY=cpu_default", *listed("BLT_MATH"))


@pytest.mark.parametrize("source", listed("BLT_OP_SOURCES"))
def test_ops_compile(source: str) -> None:
    check(source, "-fsyntax-only", f"-DTORCH_TARGET_VERSION={listed('BLT_TORCH_TARGET_VERSION')[0].strip(chr(34))}")


@pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64 (Debian's package qemu-user-static)")
def test_entropies_are_right_with_fused_multiply_adds(tmp_path: Path) -> None:
    program = tmp_path / "entropy"
    sources = [str(ROOT / name) for name in ("tests/aarch64_entropy.cpp", "csrc/cpu/entropy.cpp")]
    flags = ["-std=gnu++20", "-O2", "-static", "-DBLT_CPU_CAPABILITY=cpu_default", *listed("BLT_MATH")]
    subprocess.run([COMPILER, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", str(program)], check=True)
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
