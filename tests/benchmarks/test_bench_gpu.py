"""The report that only a machine with a GPU can make: its steps, run here as far as they go."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.machine import REPOSITORY
from benchmarks.ops import OPS


def test_steps_of_the_gpu_report():
    step = gpu.run([sys.executable, "-c", "print('== 3 passed, 1 skipped in 2 s')"], 60)
    assert step["status"] == "ok" and step["tests"] == {"passed": 3, "skipped": 1}
    step = gpu.run([sys.executable, "-c", "import sys; print('why'); sys.exit(9)"], 60)
    assert step["status"] == "exit 9" and step["output"] == "why\n"
    step = gpu.run([sys.executable, "-c", "import time; print('begun'); time.sleep(60)"], 2)
    assert step["status"] == "stopped after 2 s" and step["output"] == "begun\n"
    assert gpu.run(["no-such-program"], 1)["status"] == "not run"
    step = gpu.run([sys.executable, "-c", "print('== 7 skipped in 1 s')"], 60)
    assert step["status"] == "nothing was tested"


def test_a_step_that_is_stopped_leaves_nothing_running(tmp_path):
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert gpu.run([sys.executable, "-c", parent], 1)["status"] == "stopped after 1 s"
    time.sleep(4)
    assert not (tmp_path / "alive").exists()


def test_steps_of_the_gpu_report_are_all_benchmarks():
    made = gpu.steps(Path("out"))
    assert {f"bench {op}" for op in OPS} < set(made)
    done = subprocess.run([*made["bench patch_pool"][0], "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m benchmarks ops" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_report_needs_a_gpu():
    """It says so with torch alone: not even our own library is imported before it is built."""
    blocked = "blt_kernels", "rich", "typer", "matplotlib", "tokenizers"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\nfrom benchmarks.__main__ import main; main(['gpu'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "benchmarks gpu: not run: torch sees no GPU here\n"


def test_a_step_that_went_wrong_says_why_in_one_line():
    step = gpu.run([sys.executable, "-c", "import no_such_module"], 60)
    assert gpu.said(step).startswith("exit 1, ") and gpu.said(step).endswith("No module named 'no_such_module'")
    assert gpu.said({"status": "ok", "seconds": 1.5, "output": "much"}) == "ok, 1.5 s"


def test_a_report_goes_on_at_the_same_commit(tmp_path):
    path, steps = tmp_path / "gpu_report.json", {"tests": {"status": "ok"}}
    assert gpu.earlier_steps(path, "abc") == {}
    path.write_text(json.dumps({"commit": "abc", "steps": steps}))
    assert gpu.earlier_steps(path, "abc") == steps and gpu.earlier_steps(path, "def") == {}
    for text in ('{"commit": "ab', "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"gpu_report\.json: damaged"):
            gpu.earlier_steps(path, "abc")
