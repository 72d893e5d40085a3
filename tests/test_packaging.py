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


needs_cuda_build = pytest.mark.skipif(
    "cuda" not in blt_kernels.build_info()["build"]["backends"], reason="built without CUDA: there is no nvcc here"
)
ALL = {"nvcc": "13.0.88", "sm": "75, 80, 90a, 100, 120", "ptx": "100"}


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 0), ALL, False),
        *(((major, minor), ALL, True) for major, minor in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0))),
        *(((major, minor), ALL, True) for major, minor in ((10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0))),
        ((7, 2), ALL, False),
        ((8, 7), ALL, False),  # an integrated device runs its own binaries alone, or PTX
        ((8, 7), ALL | {"sm": "87", "ptx": ""}, True),
        ((9, 0), ALL | {"sm": "90a", "ptx": ""}, True),
        ((9, 1), ALL | {"sm": "90a", "ptx": ""}, False),  # "a" is for one capability
        ((10, 3), ALL | {"sm": "100f", "ptx": ""}, True),  # "f" for a family
        ((8, 0), ALL | {"sm": "86", "ptx": ""}, False),
        ((10, 0), ALL | {"sm": "75, 80, 90a", "ptx": "90"}, True),
    ],
)
def test_a_device_that_the_build_does_not_cover_is_named(
    capability: tuple[int, int], built: dict[str, str], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(backend, "build_record", lambda: {"cuda": built})
    monkeypatch.setattr(backend, "_driver_major", lambda: 13)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backend, "_device_problems", {})
    monkeypatch.setattr(backend, "_AVAILABLE", ("cpu", "cuda", "reference"))
    monkeypatch.setattr(backend, "_ON_CUDA", frozenset({"patch_pool"}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "Some GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(doctor, "available_backends", lambda: ("cpu", "cuda", "reference"))
    assert backend.cuda_problem() is None
    problem = backend.cuda_problem(device)
    assert (problem is None) == runs
    major, minor = capability
    if runs:
        assert backend.backend_for("patch_pool", device) == "cuda"
        assert doctor.problems() == []
        return
    assert f"Some GPU has compute capability {major}.{minor}, and the build has sm_" in problem
    assert problem.endswith(f"with BLT_CUDA_ARCHITECTURES={major}{minor}")
    assert doctor.problems() == [f"backend cuda cannot serve cuda:0: {problem}"]
    with pytest.warns(UserWarning, match="no kernel of patch_pool for cuda tensors"):
        backend._warned.discard(("patch_pool", "cuda"))
        assert backend.backend_for("patch_pool", device) == "reference"
    with (
        pytest.raises(ValueError, match=r"patch_pool: device: expected one that the CUDA kernels run on, got cuda:0: "),
        blt_kernels.use_backend("cuda"),
    ):
        backend.backend_for("patch_pool", device)


def test_torch_compile_takes_a_devices_problem_as_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(backend, "_device_problems", {})
    monkeypatch.setattr(backend, "cuda_problem", lambda device: asked.append(device))
    monkeypatch.setattr(backend, "_AVAILABLE", ("cpu", "cuda", "reference"))
    monkeypatch.setattr(backend, "_ON_CUDA", frozenset({"patch_pool"}))

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if backend._choose("patch_pool", torch.device("cuda", 0)) == "cuda" else x

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 1 and compiled(torch.zeros(1)) == 1 and asked == [torch.device("cuda", 0)]


def test_importing_the_ops_does_not_import_the_compiler() -> None:
    """torch._dynamo takes seconds to import, and most programs never use it."""
    code = "import sys, blt_kernels; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# What setup.py asks CMake for, without running it.
ASK_SETUP = """
import json, runpy, subprocess, sys
commands = []
subprocess.run = lambda command, **options: commands.append(command)
sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
print(json.dumps(commands))
"""


def setup_commands(**environment: str) -> list[list[str]]:
    names = ("BLT_BUILD_CUDA", "BLT_CUDA_ARCHITECTURES")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", ASK_SETUP]
    done = subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_setup_passes_the_architectures_on_and_forgets_those_of_an_earlier_build() -> None:
    assert "-DBLT_CUDA_ARCHITECTURES=" in setup_commands()[0]
    assert "-DBLT_CUDA_ARCHITECTURES=80;90a" in setup_commands(BLT_CUDA_ARCHITECTURES="80, 90a")[0]


@pytest.mark.parametrize("folder", ["cmake/data/bin", "bin"])
def test_setup_finds_cmake_in_its_python_package(folder: str, tmp_path: Path) -> None:
    """Where pip --target put it, say, and neither the interpreter's folder nor the PATH has it."""
    (tmp_path / "cmake").mkdir()
    (tmp_path / "cmake" / "__init__.py").touch()
    program = tmp_path / folder / "cmake"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    where = f"import sys; sys.executable = {str(tmp_path / 'python')!r}\n"
    code = where + f"sys.path.insert(0, {str(tmp_path)!r})\n" + ASK_SETUP
    ninja = tmp_path / "ninja"
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [command[0] for command in json.loads(done.stdout.splitlines()[-1])] == [str(program)] * 2


@needs_cuda_build
@pytest.mark.parametrize(
    ("architectures", "code", "record"),
    [
        ("", ["sm_75", "sm_80", "sm_90a", "sm_100", "sm_120", "compute_100"], ("75, 80, 90a, 100, 120", "100")),
        ("90a", ["sm_90a"], ("90a", "")),
        ("80;87", ["sm_80", "sm_87"], ("80, 87", "")),
    ],
)
def test_cmake_builds_for_the_architectures_that_are_asked_for(
    architectures: str, code: list[str], record: tuple[str, str], tmp_path: Path
) -> None:
    configure, _ = setup_commands(BLT_BUILD_CUDA="1", BLT_CUDA_ARCHITECTURES=architectures)
    moved = [str(tmp_path) if word == str(ROOT / "build") else word for word in configure]
    moved = [f"-DBLT_OUTPUT_DIR={tmp_path}" if word.startswith("-DBLT_OUTPUT_DIR=") else word for word in moved]
    subprocess.run(moved, check=True, capture_output=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    (entropy,) = [entry["command"] for entry in commands if entry["file"].endswith("csrc/cuda/entropy.cu")]
    assert re.findall(r",code=\[?(\w+)", entropy) == code
    built = json.loads((tmp_path / "build_record.json").read_text())["cuda"]
    assert (built["sm"], built["ptx"]) == record


@needs_cuda_build
def test_the_ptx_of_a_build_serves_devices_without_a_binary(tmp_path: Path) -> None:
    """The driver compiles it there; ptxas is the same compiler."""
    built = blt_kernels.build_info()["build"]["cuda"]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if int(built["nvcc"].split(".")[0]) < 13:
        pytest.skip("not run: this nvcc does not know compute capability 11.0")
    ptx = tmp_path / "entropy.ptx"
    source = ROOT / "csrc" / "cuda" / "entropy.cu"
    command = [nvcc, "-std=c++20", "-O3", "-arch=compute_100", "-ptx", f"-I{ROOT / 'csrc'}", "-o", str(ptx)]
    subprocess.run([*command, str(source)], check=True)
    for name in ("sm_110", "sm_103", "sm_121"):
        ptxas = str(Path(nvcc).resolve().with_name("ptxas"))
        subprocess.run([ptxas, f"-arch={name}", "-o", str(tmp_path / name), str(ptx)], check=True)


@needs_cuda_build
def test_devices_are_left_to_torch() -> None:
    """cudaSetDevice would create a context on a device that has none, where torch's guard does not."""
    library = blt_kernels.build_info()["library"]
    symbols = subprocess.run(["nm", "--dynamic", library], check=True, capture_output=True, text=True).stdout
    assert {"U aoti_torch_create_device_guard", "U aoti_torch_delete_device_guard"} <= set(
        line.strip() for line in symbols.splitlines()
    )
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")]
    assert sources and not any("cudaSetDevice(" in path.read_text() for path in sources)


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
