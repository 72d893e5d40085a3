"""The command line, from raw text to a trained model, on small text and few steps."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blt_kernels
from blt_kernels.model import BLTConfig, EntropyModelConfig
from blt_kernels.model.flops import blt_flops

pytest.importorskip("typer")
from rich.console import Console

from blt_kernels.cli.show import print_flops


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from blt_kernels.cli.main import main; main()", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check:
        assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(f"def f_{i}_{j}(x):\n    return x + {j}\n" for j in range(60)))
    (folder / "more.jsonl").write_text(json.dumps({"text": "a line of text\n" * 50}) + "\nnot json\n")
    return folder


@pytest.fixture(scope="module")
def runs(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An entropy model and a BLT, trained for three steps each by the CLI."""
    folder = tmp_path_factory.mktemp("runs")
    shared = ("--steps", 3, "--batch-size", 2, "--on-error", "skip", "--holdout-bytes", 1000)
    first = run("train-entropy", texts, "--run", folder / "entropy", "--row-tokens", 128, *shared)
    assert "skipped: 1 json" in first.stderr and "more.jsonl, line 2" in first.stderr
    arguments = ("--entropy-model", folder / "entropy", "--row-patches", 32, "--patch-size", 4.5)
    run("train", texts, "--run", folder / "blt", "--threshold", "auto", *arguments, *shared)
    return folder


def test_training_writes_metrics_and_checkpoints(runs: Path) -> None:
    for name in ("entropy", "blt"):
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 3 and "held_out_bits_per_byte" in lines[-1]
        assert (runs / name / "step-00000003" / "state.json").exists()


def test_calibrate_prints_a_threshold(texts: Path, runs: Path) -> None:
    arguments = ("--entropy-model", runs / "entropy", "--patch-size", 3, "--on-error", "skip")
    assert 0 < float(run("calibrate", texts, *arguments).stdout) < 6


def test_eval_stands_beside_compressors(texts: Path, runs: Path) -> None:
    result = json.loads(run("eval", runs / "blt", texts / "0.txt", "--json").stdout)
    assert result["bytes"] == (texts / "0.txt").stat().st_size
    assert {"BLT", "gzip -9", "xz -9e"} <= result["bits_per_byte"].keys()
    assert "bits per byte" in run("eval", runs / "entropy", texts / "0.txt").stdout


def test_eval_says_on_stderr_what_was_left_out(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some text"}) + '\n{"[/INST]": 1}\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "held out.txt").write_text("held out")
    (tmp_path / "b.c").write_text("int main;")
    arguments = ("--json", "--on-error", "skip", "--exclude", "test/*", "--exclude", "tset/*")
    result = run("eval", runs / "entropy", tmp_path, *arguments)
    assert json.loads(result.stdout)["bytes"] == len("some text")
    lines = result.stderr.splitlines()
    assert "left out: 1 excluded (test/); 1 not included (b.c)" in lines  # a directory counts as one
    assert "exclude: the pattern 'tset/*' matches nothing" in lines
    # The corpus was read twice, by the model and by the compressors; the bad line counts once.
    assert [line for line in lines if "1 missing_text; first: " in line and "'[/INST]'" in line]


def test_patch_shows_and_draws(runs: Path, tmp_path: Path) -> None:
    text = "def f(x): return x"
    out = run("patch", text, "--model", runs / "blt", "--png", tmp_path / "p.png", "--html", tmp_path / "p.html")
    assert "def" in out.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (tmp_path / "p.html").read_text()
    (tmp_path / "in.txt").write_text(text)
    assert run("patch", "--file", tmp_path / "in.txt", "--model", runs / "entropy", "--threshold", 1.0).stdout


@pytest.mark.parametrize(("preset", "unit"), [("7B", 1e6), ("tiny", 1e3)])
def test_table_of_flops(preset: str, unit: float) -> None:
    config, entropy_model = BLTConfig.preset(preset), EntropyModelConfig.preset("100M" if preset == "7B" else "tiny")
    paper, inclusive = (
        blt_flops(config, 4.5, context_bytes=8192, entropy_model=entropy_model, count=count)
        for count in ("paper", "inclusive")
    )
    console = Console(file=io.StringIO(), width=80)
    print_flops(console, "title", paper, inclusive)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text and ("MFLOP" if unit == 1e6 else "kFLOP") in text
    rows = {cells[0]: cells[1:] for line in text.splitlines() if (cells := re.split(r" {2,}", line.strip()))}
    totals = [(ledger.forward / unit, ledger.training / unit) for ledger in (paper, inclusive)]
    assert rows["all"] == [x for forward, training in totals for x in (f"{forward:,.1f}", "100.0", f"{training:,.1f}")]
    assert inclusive.components.keys() <= rows.keys()
    extra = inclusive.components["entropy model"]
    share = f"{100 * extra / inclusive.forward:.1f}"
    assert rows["entropy model"] == ["-", f"{extra / unit:.1f}", share, f"{extra / unit:.1f}"]


def test_flops() -> None:
    text = run("flops", "--preset", "400M", "--patch-size", 6, "--context", 4096, "--entropy-preset", "tiny").stdout
    assert "400M, patches of 6 bytes, documents of 4,096" in text
    total = blt_flops(BLTConfig.preset("400M"), 6, context_bytes=4096, count="paper").forward
    assert f"{total / 1e6:,.1f}" in text and "24 layers over Llama 3's tokens" in text


def test_doctor() -> None:
    assert blt_kernels.build_info()["cpu_capability"] in run("doctor").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "nowhere", "nothing.txt"), "no such file"),
        (("train-entropy", "nothing.txt", "--run", "r"), "no such file"),
        (("patch", "--model", "nowhere"), "expected a text or --file, got neither"),
        (("patch", "x", "--model", "nowhere"), "no checkpoint here"),
        (("flops", "--preset", "8B"), "BLTConfig: preset: expected one of 'tiny', '400M', '1B', '7B', got '8B'"),
        (("flops", "--patch-size", "0"), "blt_flops: patch_size: expected a finite number of at least 1, got 0.0"),
    ],
)
def test_what_the_user_can_mend_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, check=False)
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_run_is_neither_overwritten_nor_resumed_from_nothing(texts: Path, runs: Path, tmp_path: Path) -> None:
    again = run("train-entropy", texts / "0.txt", "--run", runs / "entropy", check=False)
    assert again.returncode == 1 and "--resume" in again.stderr
    nothing = run("train-entropy", texts / "0.txt", "--run", tmp_path / "new", "--resume", check=False)
    assert nothing.returncode == 1 and "no run to resume" in nothing.stderr


def test_files_and_runs_that_do_not_fit_are_one_line(runs: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for command in (
        ("patch", "--model", runs / "entropy", "--threshold", "1", "--file", tmp_path / "none.txt"),
        ("train-entropy", texts / "0.txt", "--run", tmp_path / "file" / "run", "--steps", "1"),
        ("train-entropy", texts / "0.txt", "--run", tmp_path / "zero", "--steps", "0"),
        ("train", texts / "0.txt", "--run", runs / "entropy", "--resume"),
        ("train", texts / "0.txt", "--run", tmp_path / "new"),
    ):
        done = run(*command, check=False)
        assert done.returncode == 1 and done.stderr.startswith("blt-kernels: "), done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in ("train-entropy", "calibrate", "train", "eval", "patch", "flops", "doctor", "demo"):
        assert re.search(rf"\b{command}\b", text)
