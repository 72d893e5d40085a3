"""The wheel: one binary for every Python 3 and torch >= 2.10, importable away from the checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import blt_kernels
from blt_kernels import _library, doctor

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of the tree, and the wheel built from that sdist under build isolation."""
    source = tmp_path_factory.mktemp("source")
    output = tmp_path_factory.mktemp("dist")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    # The CUDA backend is built and audited in the checkout (test_cuda_build.py); once is enough.
    run(sys.executable, "-m", "build", "--outdir", str(output), str(source), cwd=output, BLT_BUILD_CUDA="0")
    return output


def test_wheel_is_one_binary_for_every_python(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    assert re.fullmatch(rf"blt_kernels-{blt_kernels.__version__}-py3-none-linux_\w+\.whl", wheel.name)
    assert len(list(distributions.glob(f"blt_kernels-{blt_kernels.__version__}.tar.gz"))) == 1
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["blt_kernels/libblt_kernels.so"]
    assert "blt_kernels/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]


def test_wheel_installs_into_a_fresh_environment(distributions: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    fresh = tmp_path / "fresh"
    run(sys.executable, "-m", "venv", str(fresh), cwd=tmp_path)
    python = str(fresh / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    # torch and numpy come from this environment: PYTHONPATH reads no .pth files, so our editable install stays out.
    site = str(Path(torch.__file__).parents[1])
    code = (
        "import json, torch, blt_kernels as b; x = torch.ones(1, 4, 2);"
        "layout = b.PatchLayout.from_lengths(torch.tensor([[1, 3]]), num_bytes=4);"
        "print(json.dumps([b.__file__, b.build_info(), b.patch_pool(x, layout, 'sum').tolist()]))"
    )
    file, info, pooled = json.loads(run(python, "-c", code, cwd=tmp_path, PYTHONPATH=site))
    assert Path(file).is_relative_to(fresh)
    assert info["build"]["version"] == blt_kernels.__version__
    assert pooled == [[[1, 1], [3, 3]]]
    assert "cpu_capability" in run(str(fresh / "bin" / "blt-kernels"), "doctor", cwd=tmp_path, PYTHONPATH=site)


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
    assert "backend triton is missing" in text
    assert ("backend cuda is missing" in text) == ("cuda" not in blt_kernels.available_backends())
