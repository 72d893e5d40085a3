"""The wheel: one binary for every Python 3 and torch >= 2.10, importable away from the checkout."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import blt_kernels
from blt_kernels import _library, backend, doctor

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel of `make wheel`.

    CI names the folder that it has just built. Elsewhere a copy of the tree is built as `make wheel` builds it, for the
    CPU alone: the CUDA backend is built and audited in the checkout (test_cuda_build.py).
    """
    if built := os.environ.get("BLT_TEST_WHEEL"):
        return ROOT / built
    source = tmp_path_factory.mktemp("source")
    output = tmp_path_factory.mktemp("dist")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    run(str(source / ".ci" / "wheel"), sys.executable, str(output), cwd=source, BLT_BUILD_CUDA="0")
    return output


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


def test_wheel_is_one_binary_for_every_python(distributions: Path, wheel: Path) -> None:
    assert re.fullmatch(rf"blt_kernels-{blt_kernels.__version__}-py3-none-manylinux_2_\d+_\w+\.whl", wheel.name)
    assert len(list(distributions.glob(f"blt_kernels-{blt_kernels.__version__}.tar.gz"))) == 1
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if ".so" in name] == ["blt_kernels/libblt_kernels.so"]
    assert "blt_kernels/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"blt_kernels", f"blt_kernels-{blt_kernels.__version__}.dist-info"}


def test_wheel_keeps_what_its_tag_promises(wheel: Path) -> None:
    """auditwheel finds no symbol newer than glibc 2.34 and GCC 11's libstdc++; name and metadata of the file say so."""
    tag = f"manylinux_2_34_{platform.machine()}"
    assert wheel.stem.endswith(f"-py3-none-{tag}")
    audit = run(sys.executable, "-m", "auditwheel", "show", str(wheel), cwd=ROOT)
    oldest = re.search(r'This\s+constrains\s+the\s+platform\s+tag\s+to\s+"manylinux_2_(\d+)_', audit)
    assert oldest and int(oldest[1]) <= 34, audit
    (metadata,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".dist-info/WHEEL"))
    assert f"Tag: py3-none-{tag}\n" in zipfile.ZipFile(wheel).read(metadata).decode()


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a program of a fresh environment in which the wheel is installed and nothing else."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", str(folder), cwd=folder)
    run(str(folder / "bin" / "pip"), "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=folder)
    # torch and numpy come from this environment: PYTHONPATH reads no .pth files, so our editable install stays out.
    site = str(Path(torch.__file__).parents[1])

    def run_fresh(program: str, *arguments: str) -> str:
        return run(str(folder / "bin" / program), *arguments, cwd=folder, PYTHONPATH=site)

    return run_fresh


def test_wheel_installs_into_a_fresh_environment(fresh: Callable[..., str], wheel: Path) -> None:
    code = (
        "import json, sys, torch, blt_kernels as b; x = torch.ones(1, 4, 2);"
        "layout = b.PatchLayout.from_lengths(torch.tensor([[1, 3]]), num_bytes=4);"
        "print(json.dumps([b.__file__, sys.prefix, b.build_info(), b.patch_pool(x, layout, 'sum').tolist()]))"
    )
    file, prefix, info, pooled = json.loads(fresh("python", "-c", code))
    assert Path(file).is_relative_to(prefix)
    assert info["build"]["version"] == blt_kernels.__version__
    assert pooled == [[[1, 1], [3, 3]]]
    assert "cpu_capability" in fresh("blt-kernels", "doctor")


def test_wheel_runs_an_example(fresh: Callable[..., str]) -> None:
    """One is enough here: tests/test_examples.py runs them all in the checkout."""
    assert fresh("python", str(ROOT / "examples" / "pool_and_gather.py")).strip()


def test_library_depends_on_libtorch_alone() -> None:
    """Stable ABI: the C shim of libtorch.so, no mangled torch or Python symbol."""
    library = str(_library.LIBRARY)
    dynamic = run("readelf", "--dynamic", "--wide", library, cwd=ROOT)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert "libtorch.so" in needed
    assert not {name for name in needed if name.startswith(("libtorch_", "libc10", "libpython", "libcudart"))}
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic
    undefined = run("nm", "--dynamic", "--undefined-only", library, cwd=ROOT).split()
    assert any(symbol.startswith("aoti_torch_") for symbol in undefined)
    unstable = [s for s in undefined if s.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at", "_ZNK3c10", "Py"))]
    assert unstable == []


def test_instruction_sets_share_no_symbol() -> None:
    """An inline function that two capabilities share could reach a processor that lacks its instructions."""
    objects = sorted((ROOT / "build" / "CMakeFiles").glob("blt_cpu_*.dir/csrc/cpu/*.o"))
    assert objects
    for path in objects:
        namespace = path.parents[2].name.removeprefix("blt_").removesuffix(".dir")
        for line in run("nm", "--defined-only", "--extern-only", str(path), cwd=ROOT).splitlines():
            assert namespace in line, f"{path.name} of {namespace} defines {line.split()[-1]}"


def test_every_capability_is_chosen_on_demand() -> None:
    code = "import torch, blt_kernels; print(torch.ops.blt_kernels.cpu_capability())"
    built = list(blt_kernels.build_info()["build"]["cpu_capabilities"])
    best = built.index(blt_kernels.build_info()["cpu_capability"])
    for capability in built[: best + 1]:
        assert run(sys.executable, "-c", code, cwd=ROOT, BLT_KERNELS_CPU_CAPABILITY=capability).strip() == capability
    environment = os.environ | {"BLT_KERNELS_CPU_CAPABILITY": "sse9"}
    failed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "expected default, avx2 or avx512, got sse9" in failed.stderr


def test_a_library_that_cannot_load_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libblt_kernels.so"
    monkeypatch.setattr(_library, "LIBRARY", broken)
    with pytest.raises(ImportError, match=r"(?s)is missing.*built:.*here: +torch.*what to do: .*pip install"):
        _library.load()
    broken.write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"(?s)cannot be loaded.*built:.*torch headers.*what to do"):
        _library.load()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match=r"2\.9\.1\+cpu is too old(?s:.*)torch>=2\.10"):
        _library.load()


def test_build_info_is_json_and_doctor_reports_it() -> None:
    info = blt_kernels.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["build"]["compiler"] and info["build"]["flags"]
    text = doctor.report()
    assert info["torch"] in text and info["build"]["compiler"] in text


def test_doctor_misses_cuda_only_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_backends", lambda: ("cpu", "reference"))
    monkeypatch.setattr(doctor, "PCI_DEVICES", tmp_path)
    if not torch.cuda.is_available():
        assert doctor.report().endswith("\nnothing is missing")
    # Only a display controller of NVIDIA's counts, not its audio function or another maker's.
    for name, vendor, kind in (("0", "0x10de", "0x040300"), ("1", "0x1002", "0x030000"), ("2", "0x10de", "0x030200")):
        assert doctor.has_nvidia_gpu() == torch.cuda.is_available()
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert doctor.has_nvidia_gpu()
    assert f"missing:\n  - backend cuda is missing: {doctor.cuda_problem()}" in doctor.report()


def test_a_backend_that_cannot_run_here_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "triton" not in backend.BACKENDS
    with pytest.raises(ValueError, match=r"use_backend: name: expected one of .*'triton'"):
        blt_kernels.use_backend("triton").__enter__()
    monkeypatch.setattr(backend, "_AVAILABLE", ("cpu", "reference"))
    monkeypatch.setattr(backend, "cuda_problem", lambda: "the reason")
    with pytest.raises(ValueError, match=r"expected one of .cpu., .reference., got 'cuda'.*: the reason"):
        blt_kernels.use_backend("cuda").__enter__()


def without_extras(door: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line where only torch and numpy can be imported."""
    extras = ("matplotlib", "pyarrow", "rich", "safetensors", "tokenizers", "typer", "zstandard")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); sys.argv[1:] = {list(arguments)!r}; {door}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


ENTRY_POINT = "from blt_kernels.cli import entry_point; entry_point()"


@pytest.mark.parametrize("door", [ENTRY_POINT, "import runpy; runpy.run_module('blt_kernels')"])
def test_doctor_needs_torch_and_numpy_alone(door: str) -> None:
    done = without_extras(door, "doctor")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.strip() == doctor.report()


@pytest.mark.parametrize("arguments", [(), ("train", "text.txt")])
def test_other_commands_say_what_to_install(arguments: tuple[str, ...]) -> None:
    done = without_extras(ENTRY_POINT, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "blt-kernels: the command line needs more packages: pip install 'blt_kernels[train]'\n"


def planned_build(tmp_path: Path, target: str, **environment: str) -> str:
    """What `make TARGET` would build in a checkout whose environment is installed."""
    for name in ("Makefile", "pyproject.toml", "requirements-build.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir(exist_ok=True)
    for stamp in ("installed-demo", "installed"):
        (tmp_path / ".venv" / stamp).touch()
    inherited = {name: value for name, value in os.environ.items() if name not in ("BLT_BUILD_CUDA", "MAKEFLAGS")}
    command = ["make", "--dry-run", target]
    plan = subprocess.run(
        command, cwd=tmp_path, env=inherited | environment, capture_output=True, text=True, check=True
    )
    (build,) = re.findall(r"BLT_BUILD_CUDA=(\w+) \S+ setup.py", plan.stdout)
    return build


def test_demo_builds_for_the_cpu_alone_unless_told_otherwise(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    no_gpu = f"{tools}:{os.environ['PATH']}"
    smi = tools / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    smi.chmod(0o755)
    assert planned_build(tmp_path, "demo", PATH=no_gpu) == "0"
    assert planned_build(tmp_path, "demo", PATH=no_gpu, BLT_BUILD_CUDA="1") == "1"
    assert planned_build(tmp_path, "test", PATH=no_gpu) == "auto"
    assert planned_build(tmp_path, "test", PATH=no_gpu, BLT_BUILD_CUDA="0") == "0"
    # A checkout that was built with CUDA keeps it, and the demo's build does not count for the tests.
    (tmp_path / "build").mkdir()
    for built, wanted in (("auto", "auto"), ("0", "0")):
        (tmp_path / "build" / "CMakeCache.txt").write_text(f"BLT_BUILD_CUDA:STRING={built}\n")
        assert planned_build(tmp_path, "demo", PATH=no_gpu) == wanted
        assert planned_build(tmp_path, "test", PATH=no_gpu) == "auto"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA'\n")
    assert planned_build(tmp_path, "demo", PATH=no_gpu) == "auto"
