"""Drives CMake for setuptools; every source, flag and architecture is in CMakeLists.txt.

scikit-build-core could do this. setup.py stays because an editable install must put the library beside the sources,
where the tests, the sanitizers and `make gpu-report` read it, and these lines are all that it takes.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE_FILES = ("libblt_kernels.so", "build_record.json")


def tool(name: str) -> str:
    """CMake or ninja: beside this interpreter, where build isolation puts them; in the Python package of that name,
    wherever it was installed to; or on the PATH."""
    folders = [Path(sys.executable).parent]
    package = importlib.util.find_spec(name)
    if package is not None and package.origin is not None:
        home = Path(package.origin).parent
        folders += [home / "data" / "bin", home.parent / "bin"]
    found = shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)
    if found is None:
        raise SystemExit(f"blt_kernels: {name} is missing: pip install {name}")
    return found


def jobs() -> int:
    """Parallel compilations: one a core, and at least 2 GB of memory for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (2 << 30)))


class CMakeBuild(build_ext):
    def run(self) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or not torch.submodule_search_locations:
            raise SystemExit("blt_kernels: torch is missing for the build: pip install torch==2.13.0")
        build = ROOT / "build" if self.editable_mode or self.inplace else Path(self.build_temp).resolve()
        output = (
            ROOT / "blt_kernels"
            if self.editable_mode or self.inplace
            else Path(self.build_lib).resolve() / "blt_kernels"
        )
        configure = [tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DBLT_OUTPUT_DIR={output}"]
        configure += [f"-DBLT_TORCH_DIR={torch.submodule_search_locations[0]}"]
        configure.append(f"-DBLT_BUILD_CUDA={os.environ.get('BLT_BUILD_CUDA') or 'auto'}")
        # Always given, because CMake would keep what an earlier build in the same folder was told.
        architectures = os.environ.get("BLT_CUDA_ARCHITECTURES", "").replace(",", " ").split()
        configure.append(f"-DBLT_CUDA_ARCHITECTURES={';'.join(architectures)}")
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build), "--parallel", str(jobs())], check=True)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "blt_kernels" / name) for name in PACKAGE_FILES]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPython(bdist_wheel):
    """One binary for every Python 3: the library uses torch's stable ABI and nothing of Python's.

    `make wheel` has auditwheel replace this tag by the one that package indexes take (.ci/wheel).
    """

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", f"linux_{platform.machine()}"


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=BinaryDistribution,
    ext_modules=[Extension("blt_kernels.libblt_kernels", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPython},
)
