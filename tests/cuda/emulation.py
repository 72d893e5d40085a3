"""Builds and loads the CUDA kernels on host threads: a library whose ops take CPU tensors (csrc/testing)."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import blt_kernels  # noqa: F401, whose schemas these are

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NAMESPACE = "blt_kernels_emulated"


def _tool(name: str) -> str:
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name) or name


def build(folder: Path, target: str, *options: str) -> None:
    """Builds a target of CMakeLists.txt in `folder`; nothing is compiled again that is up to date."""
    torch_folder = Path(torch.__file__).parent
    configure = [_tool("cmake"), "-S", str(REPOSITORY), "-B", str(folder), "-G", "Ninja", "-DBLT_BUILD_CUDA=0"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", f"-DBLT_TORCH_DIR={torch_folder}"]
    configure += [f"-DBLT_OUTPUT_DIR={folder / 'out'}", *options]
    for command in (configure, [_tool("cmake"), "--build", str(folder), "--parallel", "2", "--target", target]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}"


def build_library(folder: Path, sanitize: str = "") -> Path:
    build(folder, NAMESPACE, f"-DBLT_SANITIZE={sanitize}")
    return folder / f"lib{NAMESPACE}.so"


@functools.cache
def ops() -> Any:
    """`torch.ops.blt_kernels_emulated`, with the schemas of `torch.ops.blt_kernels`."""
    return load(build_library(REPOSITORY / "build" / "emulated"))


_library = torch.library.Library(NAMESPACE, "DEF")


def load(path: Path) -> Any:
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("blt_kernels::"):
            _library.define(str(schema).removeprefix("blt_kernels::"))
    torch.ops.load_library(path)
    return getattr(torch.ops, NAMESPACE)
