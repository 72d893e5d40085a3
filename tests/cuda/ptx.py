"""The CUDA kernels as nvcc compiled them, run by the interpreter in csrc/testing/ptx. It needs nvcc, but no GPU.

Every instruction of the PTX has a line number of its own, by which `counting` finds what became of it in SASS.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emulation
import torch
import torch.utils._pytree as pytree
from counting.numbering import numbered
from emulation import REPOSITORY
from helpers import written

SOURCES = REPOSITORY / "csrc" / "cuda"
SM = "sm_90a"
FLAGS = ("-std=c++20", "-O3", f"-arch={SM}", "-ptx", f"-I{REPOSITORY / 'csrc'}")
JOBS = 2


def nvcc() -> str | None:
    """The compiler that CMakeLists.txt finds."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [*(f"{home}/bin" for home in homes), "/usr/local/cuda/bin", os.environ.get("PATH", "")]
    return shutil.which(os.environ.get("CUDACXX", "nvcc"), path=os.pathsep.join(folders))


@functools.cache
def nvcc_version() -> str:
    """Such as "13.0.88"."""
    text = subprocess.run([nvcc() or "", "--version"], capture_output=True, check=True, text=True).stdout
    found = re.search(r"V([0-9.]+)", text)
    assert found is not None, f"nvcc --version: expected a version, got {text!r}"
    return found[1]


def compile_ptx(sources: Sequence[Path], folder: Path) -> list[Path]:
    """Compiles .cu files to numbered PTX in `folder`."""
    compiler = nvcc()
    assert compiler is not None, "there is no nvcc"

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}.ptx"
        done = subprocess.run([compiler, *FLAGS, "-o", str(out), str(source)], capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name}: nvcc failed:\n{done.stderr}"
        out.write_text(numbered(out.read_text()))
        return out

    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(compile_one, sources))


def _digest() -> str:
    """What the PTX of the library depends on: the sources, the compiler, the flags and how lines are numbered."""
    variables = (os.environ.get(f"NVCC_{name}_FLAGS", "") for name in ("PREPEND", "APPEND"))
    digest = hashlib.sha256(" ".join([nvcc_version(), *FLAGS[:-1], *variables]).encode())
    for path in sorted((REPOSITORY / "csrc").rglob("*")):  # what is compiled, and all that it can include
        if path.suffix in (".cu", ".cuh", ".h") and "testing" not in path.parts:
            digest.update(path.name.encode() + path.read_bytes())
    digest.update(Path(inspect.getfile(numbered)).read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def library_ptx() -> list[Path]:
    """The PTX of all kernels of the library, compiled when a source has changed."""
    cache = REPOSITORY / "build" / "ptx"
    folder = cache / _digest()
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        compile_ptx(sorted(SOURCES.glob("*.cu")), unfinished)
        if folder.exists():  # another process was faster
            shutil.rmtree(unfinished)
        else:
            unfinished.rename(folder)
    return sorted(folder.glob("*.ptx"))


@functools.cache
def interpreter() -> Any:
    """The ops of the emulated library, `ptx_*` among them, with all kernels of the library loaded."""
    ops = emulation.ops()
    for path in library_ptx():
        ops.ptx_load(str(path))
    return ops


def library_kernels() -> set[str]:
    """The mangled names of all kernels of the library."""
    return {name for path in library_ptx() for name in re.findall(r"\.entry (\w+)", path.read_text())}


def readable(names: Sequence[str]) -> list[str]:
    """Mangled names of kernels as C++ spells them."""
    done = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True)
    return done.stdout.splitlines() if names else []


def interpret(name: str, args: Sequence[Any], reverse: bool = False, ordered: bool = True) -> Any:
    """Calls an op whose kernels the interpreter runs; they may touch nothing but arguments, results and scratch.

    Args:
        reverse: whether the last block and warp run first.
        ordered: whether the result is one that no order of blocks may change.
    """
    ops = interpreter()
    ops.ptx_forbid_all()
    for leaf in pytree.tree_leaves(args):
        if isinstance(leaf, torch.Tensor):
            ops.ptx_allow(leaf)
    ops.ptx_mode(True, reverse)
    ops.ptx_check_blocks(ordered)
    try:
        return getattr(ops, name)(*args)
    finally:
        ops.ptx_mode(False, False)


class PTXOps:
    """The ops, with their kernels interpreted; they may touch nothing but the arguments, results and scratch.

    Each call runs twice, the second time with the last block and warp first, and must give the same bits.
    """

    ordered = True  # whether the result is one that no order of blocks may change

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            changed = written(name)
            copies = [x.clone() if i in changed else x for i, x in enumerate(args)]
            result = interpret(name, args, ordered=self.ordered)
            again = interpret(name, copies, reverse=True, ordered=self.ordered)
            if self.ordered:
                first = pytree.tree_leaves((result, [args[i] for i in changed]))
                second = pytree.tree_leaves((again, [copies[i] for i in changed]))
                for a, b in zip(first, second, strict=True):
                    assert same_bits(a, b), f"{name}: the order of blocks and warps changes the result"
            return result

        return call


@contextlib.contextmanager
def any_result() -> Iterator[None]:
    """For values that are no layout: kernels must stay within the tensors, but blocks may write the same bytes."""
    PTXOps.ordered = False
    try:
        yield
    finally:
        PTXOps.ordered = True


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
