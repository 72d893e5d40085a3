"""The report that only a machine with a GPU can make: its steps, rehearsed here as far as they go."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

import blt_kernels
from benchmarks import gpu
from benchmarks.gpu import Step
from benchmarks.machine import REPOSITORY, describe_machine
from benchmarks.ops import OPS

needs_cuda_build = pytest.mark.skipif(
    "cuda" not in blt_kernels.build_info()["build"]["backends"], reason="built without CUDA: there is no nvcc here"
)


def python(code: str, **options) -> Step:
    return Step([sys.executable, "-c", code], 60, **options)


def test_steps_of_the_gpu_report():
    done = gpu.run(python("print('== 3 passed, 1 skipped in 2 s')"))
    assert done["status"] == "ok" and done["tests"] == {"passed": 3, "skipped": 1}
    done = gpu.run(python("import sys; print('why'); sys.exit(9)"))
    assert done["status"] == "exit 9" and done["output"] == "why\n"
    done = gpu.run(python("import time; print('begun'); time.sleep(60)"), 2)
    assert done["status"] == "stopped after 2 s" and done["output"] == "begun\n"
    assert gpu.run(Step(["no-such-program"], 1))["status"] == "not run"
    assert gpu.run(python("print('== 7 skipped in 1 s')"))["status"] == "nothing was tested"
    done = gpu.run(python("print('12/40 tests collected (28 deselected) in 3 s')"))
    assert done["status"] == "ok" and done["tests"] == {"collected": 12}
    done = gpu.run(python("import os; print(os.environ['A'])", environment={"A": "set"}))
    assert done["output"] == "set\n"


def test_a_step_without_its_result_is_not_well(tmp_path):
    result = tmp_path / "patch_pool.json"
    step = python(f"open({str(result)!r}, 'w').write('{{')", result=result)
    assert re.match(r"its result cannot be read: .*patch_pool\.json: not a readable", gpu.run(step)["status"])
    assert "No such file" in gpu.run(python("pass", result=tmp_path / "none.json"))["status"]


def test_a_failed_step_keeps_enough_of_its_output_for_every_failed_test():
    code = "import sys; print('x' * 50_000); sys.exit({})"
    assert len(gpu.run(python(code.format(0)))["output"]) == gpu.TAIL
    assert len(gpu.run(python(code.format(1)))["output"]) == 50_001


def test_a_step_that_is_stopped_leaves_nothing_running(tmp_path):
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert gpu.run(python(parent), 1)["status"] == "stopped after 1 s"
    time.sleep(4)
    assert not (tmp_path / "alive").exists()


def test_a_report_that_is_stopped_stops_its_step(tmp_path):
    begun, alive = tmp_path / "begun", tmp_path / "alive"
    step = f"import time, pathlib; pathlib.Path({str(begun)!r}).touch(); time.sleep(4); open({str(alive)!r}, 'w')"
    code = (
        "import signal, sys\nfrom benchmarks import gpu\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"gpu.run(gpu.Step([sys.executable, '-c', {step!r}], 60))"
    )
    report = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    while not begun.exists():
        assert report.poll() is None
        time.sleep(0.1)
    report.send_signal(signal.SIGTERM)
    assert report.wait(60) != 0
    time.sleep(4)
    assert not alive.exists()


def test_every_step_has_a_name_and_a_file_of_its_own():
    made = gpu.steps(Path("out"), dry=True)
    assert tuple(made) == gpu.STEPS
    assert {step.result.name for step in made.values() if step.result} == {f"{op}.json" for op in OPS}


def test_what_a_gpu_gets_differs_from_the_rehearsal_only_in_where_it_runs(monkeypatch):
    """The rehearsal has every program read its options, so what it does not pass on must be known to be right."""
    monkeypatch.setattr(gpu, "device_name", lambda device: "a device")
    monkeypatch.setattr(gpu, "sanitizer", lambda tool: ["compute-sanitizer", "--tool", tool])
    dry, real = (gpu.steps(Path("out"), dry) for dry in (True, False))
    for name in gpu.STEPS:
        ours, theirs = (set(made[name].command) for made in (dry, real))
        assert ours - theirs <= {"--collect-only", "--tiny", "1", "cpu"}
        assert theirs - ours <= {"--device", "cuda", "9", "compute-sanitizer", "--tool", name, "gpu"}
    assert real["memcheck"].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["no-op" if word in OPS else word for word in real["patch_pool"].command]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and "got 'no-op'" in done.stderr


def test_compute_sanitizer_is_found_beside_nvcc_and_looks_at_our_kernels_alone(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    command = gpu.sanitizer("racecheck")
    assert command[:3] == [str(program), "--tool", "racecheck"]
    key, _, part = command[command.index("--kernel-name") + 1].partition("=")
    assert key == "kernel_substring"
    if "cuda" in blt_kernels.build_info()["build"]["backends"]:
        # The names under which kernels are registered with the CUDA runtime.
        kernels = re.findall(
            rb"\x00(_ZN\w+_kernel[IEPv]\w*)(?=\x00)", Path(blt_kernels.build_info()["library"]).read_bytes()
        )
        assert kernels and all(part.encode() in name for name in kernels)


@needs_cuda_build
def test_the_whole_report_rehearsed(tmp_path):
    """Every kind of step once. `make gpu-report DRY=1` walks through all of them."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry", "--commit", "abc", "--out", str(tmp_path)]
    archive = tmp_path / "report.tar.gz"
    command += ["--steps", "tests", "linear_entropy", "racecheck", "--archive", str(archive)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/gpu_report.json")
    report = json.loads(path.read_text())
    assert {name: step["status"] for name, step in report["steps"].items()} == dict.fromkeys(
        ("build", "tests", "linear_entropy", "racecheck"), "ok"
    )
    assert report["steps"]["tests"]["tests"]["collected"] > 1000
    assert report["commit"] == "abc" and report["dry"]
    files = sorted(file.name for file in path.parent.iterdir())
    assert files == ["gpu_report.json", "linear_entropy.json"]
    with tarfile.open(archive) as packed:
        members = {name: packed.extractfile(f"{path.parent.name}/{name}") for name in files}
        assert all(member.read() == (path.parent / name).read_bytes() for name, member in members.items())
    result = json.loads((path.parent / "linear_entropy.json").read_text())
    assert result["commit"] == "abc" and result["tiny"] and result["dtype"] == "bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_report_needs_a_gpu():
    """It says so with torch alone: not even our own library is imported before it is built."""
    blocked = "blt_kernels", "rich", "typer", "matplotlib", "tokenizers"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\nfrom benchmarks.__main__ import main; main(['gpu'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "benchmarks gpu: not run: torch sees no GPU here\n"


def test_a_failed_build_leaves_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "build", lambda architecture, dry: python("import sys; print('no nvcc'); sys.exit(1)"))
    monkeypatch.setattr(signal, "signal", lambda *handler: None)  # of this process too
    with pytest.raises(RuntimeError, match=r"the build failed"):
        gpu.main(["--dry", "--out", str(tmp_path / "out"), "--archive", str(tmp_path / "packed" / "report.tar.gz")])
    with tarfile.open(tmp_path / "packed" / "report.tar.gz") as packed:
        assert any(name.endswith("/gpu_report.json") for name in packed.getnames())
    with pytest.raises(RuntimeError, match=r"the build failed, .*gpu_report\.json has its output: exit 1, .*: no nvcc"):
        gpu.make_report(tmp_path, None, None, dry=True)
    (path,) = tmp_path.glob("*/gpu_report.json")
    assert json.loads(path.read_text())["steps"]["build"]["output"] == "no nvcc\n"


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "90a"), ((8, 6), "86"), ((12, 1), "121")])
def test_the_build_is_for_the_gpu_that_is_there(capability, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert gpu.build(gpu.architecture_here(), dry=False).environment["BLT_CUDA_ARCHITECTURES"] == name


def test_a_library_that_was_built_elsewhere(tmp_path, monkeypatch):
    built, package = tmp_path / "built", tmp_path / "package"
    built.mkdir()
    package.mkdir()
    monkeypatch.setattr(gpu, "PACKAGE", package)
    library, record = built / "libblt_kernels.so", built / "build_record.json"
    library.write_bytes(b"binary")
    with pytest.raises(ValueError, match=r"expected libblt_kernels.so and build_record.json in one folder"):
        gpu.take_library(library, dry=False)
    record.write_text('{"cuda": null}')
    with pytest.raises(ValueError, match="built without them"):
        gpu.take_library(library, dry=False)
    record.write_text('{"cuda": {"nvcc": "13.0"}}')
    assert gpu.take_library(library, dry=True)["status"] == "ok" and not list(package.iterdir())
    assert gpu.take_library(library, dry=False)["status"] == "ok"
    assert (package / library.name).read_bytes() == b"binary" and (package / record.name).exists()
    assert len(list(package.iterdir())) == 2
    assert gpu.take_library(package / library.name, dry=False)["status"] == "ok"
    assert gpu.hash_of_sources(library) != gpu.hash_of_sources(None)


def test_a_step_that_went_wrong_says_why_in_one_line():
    done = gpu.run(python("import no_such_module"))
    assert gpu.said(done).startswith("exit 1, ") and gpu.said(done).endswith("No module named 'no_such_module'")
    assert gpu.said({"status": "ok", "seconds": 1.5, "output": "much"}) == "ok, 1.5 s"


def test_a_report_goes_on_with_the_same_sources(tmp_path):
    path, steps = tmp_path / "gpu_report.json", {"tests": {"status": "ok"}}
    assert gpu.earlier_steps(path, "abc", False) == {}
    path.write_text(json.dumps({"sources": "abc", "dry": False, "steps": steps}))
    assert gpu.earlier_steps(path, "abc", False) == steps
    assert gpu.earlier_steps(path, "def", False) == gpu.earlier_steps(path, "abc", True) == {}
    for text in ('{"sources": "ab', "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"gpu_report\.json: damaged"):
            gpu.earlier_steps(path, "abc", False)


def test_the_hash_of_the_sources_changes_with_each_of_them(tmp_path, monkeypatch):
    for name in ("csrc/cuda/a.cu", "blt_kernels/b.py", "benchmarks/c.py", "tests/d.py", "CMakeLists.txt", "setup.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(gpu, "REPOSITORY", tmp_path)
    hashes = {gpu.hash_of_sources(None)}
    for i, path in enumerate(sorted(path for path in tmp_path.rglob("*") if path.is_file())):
        path.write_text("two")
        hashes.add(gpu.hash_of_sources(None))
        assert len(hashes) == i + 2
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").touch()
    assert gpu.hash_of_sources(None) in hashes


def test_a_commit_can_be_named_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("BLT_KERNELS_COMMIT", "abc")
    assert describe_machine(torch.device("cpu"))["commit"] == "abc"


def test_make_passes_its_variables_on():
    variables = ("COMMIT=abc", "STEPS=tests patch_pool", "LIBRARY=a/b.so", "ARCHIVE=c.tar.gz", "DRY=1")
    # A make under another one, as in `make test`, would say which directory it enters.
    command = ["make", "--dry-run", "--no-print-directory", "gpu-report", *variables]
    plan = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    words = plan.replace("\\\n", " ").replace("'", "").split()
    assert words[3:] == [
        *("gpu", "--out", "runs/bench", "--commit", "abc", "--steps", "tests", "patch_pool"),
        *("--library", "a/b.so", "--archive", "c.tar.gz", "--dry"),
    ]
