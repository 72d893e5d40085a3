"""The command line, from raw text to a trained model, on small text and few steps."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import blt_kernels
from blt_kernels.data import encode
from blt_kernels.model import BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.model.config import BLT_PRESETS, ENTROPY_PRESETS
from blt_kernels.model.flops import blt_flops

pytest.importorskip("typer")
from rich.console import Console

from blt_kernels.cli import demo, look
from blt_kernels.cli import main as cli
from blt_kernels.cli.console import describe, printable
from blt_kernels.cli.options import threshold_or_auto
from blt_kernels.cli.progress import training_progress
from blt_kernels.cli.show import print_bits, print_flops, show_patches
from blt_kernels.training import runs as runs_
from blt_kernels.training.load import load_model
from blt_kernels.training.patcher import Patcher, PatcherConfig
from blt_kernels.training.rows import RowShape


@dataclasses.dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object, check: bool = True, encoding: str = "utf-8") -> Result:
    """`blt-kernels` in this process, with streams of its own."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    status: Any = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["blt-kernels", *map(str, arguments)])
        patch.setenv("COLUMNS", "100")
        try:
            cli.main()
        except SystemExit as done:
            status = done.code or 0
            if isinstance(status, str):
                print(status, file=err)
                status = 1
    stdout, stderr = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))  # type: ignore[attr-defined]
    if check:
        assert status == 0, f"{arguments}\n{stdout}\n{stderr}"
    return Result(status, stdout, stderr)


def fails(*arguments: object) -> str:
    """The one line with which the command line refuses something."""
    result = run(*arguments, check=False)
    assert result.returncode == 1, result
    assert result.stderr.startswith("blt-kernels: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module", autouse=True)
def small_blt() -> Iterator[None]:
    """A smaller BLT in the preset that is trained here: its checkpoints would hold 300 MB."""
    local, latent = TransformerConfig(32, 1, 2, 64, window=16), TransformerConfig(64, 1, 2, 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLT_PRESETS, "tiny", BLTConfig(local, latent, local, ngram_sizes=(3, 4), hash_rows=1009))
        patch.setitem(ENTROPY_PRESETS, "ngram", dataclasses.replace(ENTROPY_PRESETS["ngram"], hash_rows=1009))
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(f"def f_{i}_{j}(x):\n    return x + {j}\n" for j in range(60)))
    (folder / "more.jsonl").write_text(json.dumps({"text": "a line of text\n" * 50}) + "\nnot json\n")
    return folder


SHARED = ("--on-error", "skip", "--holdout-bytes", 1000)


@pytest.fixture(scope="module")
def runs(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An entropy model and a BLT, trained for a few steps each by the CLI."""
    folder = tmp_path_factory.mktemp("runs")
    steps = ("--steps", 4, "--checkpoint-every", 2)
    first = run("train-entropy", texts, "--run", folder / "entropy", "--row-tokens", 256, *steps, *SHARED)
    assert "skipped: 1 json" in first.stderr and "more.jsonl, line 2" in first.stderr
    arguments = ("--entropy-model", folder / "entropy", "--row-tokens", 192, "--patch-size", 3, "--max-patch-length", 5)
    run("train", texts, "--run", folder / "blt", "--threshold", "auto", "--steps", 3, *arguments, *SHARED)
    return folder


def metrics(run_: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_ / "metrics.jsonl").read_text().splitlines()]


def last_losses(run_: Path) -> tuple[float, float]:
    return metrics(run_)[-1]["loss"], metrics(run_)[-1]["held_out_bits_per_byte"]


# What the commands do


def test_training_writes_metrics_and_checkpoints(runs: Path) -> None:
    for name, steps in (("entropy", 4), ("blt", 3)):
        assert metrics(runs / name)[-1]["step"] == steps and "held_out_bits_per_byte" in metrics(runs / name)[-1]
        assert (runs / name / f"step-{steps:08d}" / "state.json").exists()


def test_calibrate_prints_a_threshold_and_nothing_else(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("not json\n" + "".join(json.dumps({"text": f"line {i} " * 9}) + "\n" for i in range(40)))
    arguments = ("--entropy-model", runs / "entropy", "--patch-size", 3, "--on-error", "skip")
    result = run("calibrate", path, *arguments)
    assert 0 < float(result.stdout) < 6
    assert "skipped: 1 json" in result.stderr


def test_a_blt_on_patches_from_tables_of_ngrams(texts: Path, tmp_path: Path) -> None:
    """The entropy model's tables learn, go with the BLT's checkpoint, and cut the same patches there."""
    arguments = ("--steps", 3, "--row-tokens", 256, "--table-optimizer", "rowwise_adagrad", *SHARED)
    run("train-entropy", texts, "--run", tmp_path / "entropy", "--preset", "ngram", *arguments)
    run(
        "train",
        texts,
        "--run",
        tmp_path / "blt",
        "--entropy-model",
        tmp_path / "entropy",
        "--patch-size",
        3,
        *arguments,
    )
    model, _, _ = load_model(tmp_path / "entropy")
    _, patcher, _ = load_model(tmp_path / "blt")
    assert model.hash_tok_embedding.weight.any()
    assert torch.equal(model.hash_tok_embedding.weight, patcher.entropy_model.hash_tok_embedding.weight)
    document = encode(b"def f(x):\n    return x\n")
    assert (Patcher(patcher.config, model)(document) == patcher(document)).all()


def test_eval_stands_beside_compressors(texts: Path, runs: Path) -> None:
    result = json.loads(run("eval", runs / "blt", texts / "0.txt", "--json").stdout)
    assert result["bytes"] == (texts / "0.txt").stat().st_size
    assert {"BLT", "gzip -9", "xz -9e"} <= result["bits_per_byte"].keys()
    assert "bits per byte" in run("eval", runs / "entropy", texts / "0.txt").stdout


def test_json_on_stdout_is_json_whatever_is_skipped(runs: Path, tmp_path: Path) -> None:
    """What rich would take for markup, and what a terminal would obey, in keys and in the name of the file."""
    data = tmp_path / "[bold]:smile:\x1b[31m.jsonl"
    data.write_text(json.dumps({"text": "fine text"}) + "\n" + json.dumps({"[/INST]": "x", "[red]": 1}) + "\n")
    result = run("eval", runs / "entropy", data, "--json", "--on-error", "skip")
    assert json.loads(result.stdout)["bytes"] == 9
    assert "'[/INST]', '[red]'" in result.stderr and "[bold]:smile:\\x1b[31m.jsonl, line 2" in result.stderr
    assert "skipped: 1 missing_text" in result.stderr  # though the model and the compressors have read it
    assert "bits per byte of 9 bytes" in run("eval", runs / "entropy", data, "--on-error", "skip").stdout


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
    assert "def" in out.stdout.replace("|", "") and str(tmp_path / "p.png") in out.stderr
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (tmp_path / "p.html").read_text()
    (tmp_path / "in.txt").write_text(text)
    assert run("patch", "--file", tmp_path / "in.txt", "--model", runs / "entropy", "--threshold", 1.0).stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "p.html", "p.png"]


def test_a_text_too_long_for_a_picture_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patcher = Patcher(PatcherConfig(threshold=1.0), EntropyModel(EntropyModelConfig.preset("tiny")))
    monkeypatch.setattr(patcher, "cut", interrupt)
    with pytest.raises(ValueError, match="patch: --png: expected at most 4800 tokens"):
        show_patches(cli.console, patcher, b"x" * 5000, png=tmp_path / "p.png")


def test_a_shown_text_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = EntropyModel(EntropyModelConfig.preset("tiny"))
    read, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, **arguments: read.append(0) or hidden(tokens, **arguments))
    show_patches(cli.console, Patcher(PatcherConfig(threshold=1.0), model), b"some text")
    assert len(read) == 1


def test_patch_replaces_the_threshold_and_nothing_else(runs: Path) -> None:
    """At the saved threshold the patches are those of the run: its rule, its delta and its longest patch stay."""
    state = json.loads((runs / "blt" / "step-00000003" / "state.json").read_text())["state"]
    config = state["patcher"]["config"]
    assert config["max_patch_length"] == 5
    text = "return x + 12345 and so on " * 4
    saved = run("patch", text, "--model", runs / "blt").stdout
    assert run("patch", text, "--model", runs / "blt", "--threshold", repr(config["threshold"])).stdout == saved
    never = run("patch", text, "--model", runs / "blt", "--threshold", 50).stdout.splitlines()[0]
    assert {len(patch) for patch in never.split("|")[1:-1]} == {5}


def test_boundaries_are_seen_without_colour_at_any_length(runs: Path, tmp_path: Path) -> None:
    """On a pipe, and on a terminal under NO_COLOR: nothing is lost to wrapping, and the text's own bars are escaped."""
    text = "  a | b    " * 300
    (tmp_path / "long.txt").write_text(text)
    shown = run("patch", "--file", tmp_path / "long.txt", "--model", runs / "blt").stdout.splitlines()[0]
    assert shown.count("|") > 300
    assert shown.replace("|", "").replace("\\x7c", "|") == f"<BOS>{text}<EOS>"

    def terminal(no_color: bool) -> str:
        file = io.StringIO()
        console = Console(file=file, width=40, force_terminal=True, color_system="truecolor", no_color=no_color)
        show_patches(console, Patcher(PatcherConfig("spaces")), b"two words")
        return file.getvalue()

    assert "<BOS>|" in re.sub(r"\x1b\[[\d;]*m", "", terminal(no_color=True))
    coloured = terminal(no_color=False)
    assert "48;2;" in coloured and "|" not in coloured


def test_generate_continues_a_text(runs: Path) -> None:
    """The same text whole and as a stream; speed and patches are said apart from it."""
    command = ("generate", runs / "blt", "--prompt", "def f", "--max-bytes", 30, "--seed", 3, "--temperature", 0.7)
    whole, streamed = run(*command), run(*command, "--stream")
    assert whole.stdout == streamed.stdout and whole.stdout.startswith("def f")
    assert re.search(r"^\d+ bytes in \d+\.\d\d s, [\d,]+ bytes/s, \d\.\d\d bytes a patch\n$", whole.stderr)
    assert run("generate", runs / "blt", "--prompt", "x", "--max-bytes", 0).stdout == "x\n"
    options = ("--top-k", 9, "--top-p", 0.9, "--min-p", 0.1, "--repetition-penalty", 1.2, "--exact-entropies")
    assert run(*command, *options, "--stop", "e", "--stop", "x").stdout.startswith("def f")
    assert "generate: top_p: expected a finite number above 0 and at most 1, got 7.0" in fails(*command, "--top-p", 7)
    assert "expected a BLT with a patcher, got an entropy model" in fails("generate", runs / "entropy")


def test_bytes_on_the_command_line_are_those_that_were_typed(runs: Path) -> None:
    shown = run("patch", os.fsdecode(b"a\xff"), "--model", runs / "entropy", "--threshold", 1).stdout
    assert "\\xff" in shown.splitlines()[0]


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
    assert "400M, patches of 6 bytes, sequences of 4,096" in text
    total = blt_flops(BLTConfig.preset("400M"), 6, context_bytes=4096, count="paper").forward
    assert f"{total / 1e6:,.1f}" in text and "24 layers over Llama 3's tokens" in text


def test_doctor() -> None:
    assert blt_kernels.build_info()["cpu_capability"] in run("doctor").stdout


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in ("train-entropy", "calibrate", "train", "eval", "patch", "generate", "flops", "doctor", "demo"):
        assert re.search(rf"\b{command}\b", text)


# Runs: started, stopped, resumed


def test_a_run_is_not_overwritten(texts: Path, runs: Path) -> None:
    assert "there is a run here already; continue it with --resume" in fails(
        "train-entropy", texts / "0.txt", "--run", runs / "entropy"
    )


def test_resume_starts_where_there_is_nothing_to_lose(texts: Path, runs: Path, tmp_path: Path) -> None:
    """Before its first checkpoint a run has written metrics, perhaps, or half of a checkpoint, or nothing at all."""
    arguments = ("--row-tokens", 256, "--steps", 4, *SHARED, "--resume")
    for left in ("none", "[/INST]", "metrics", "partial"):
        run_ = tmp_path / left
        if left in ("metrics", "partial"):
            run_.mkdir()
            (run_ / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
        if left == "partial":
            (run_ / ".step-00000002.partial").mkdir()
        result = run("train-entropy", texts, "--run", run_, *arguments)
        assert f"{run_}: no checkpoint yet" in result.stderr and str(run_) in result.stdout
        assert last_losses(run_) == last_losses(runs / "entropy")
        assert sorted(path.name for path in run_.iterdir()) == ["metrics.jsonl", "step-00000004"]


def test_a_run_that_lies_in_its_text_is_resumed(texts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(texts, tmp_path / "text")
    command = ("train-entropy", folder, "--run", folder / "run", "--row-tokens", 128, "--steps", 2, *SHARED)
    run(*command)
    result = run(*command, "--resume")
    assert "metrics of a run (run/metrics.jsonl)" in result.stderr
    assert "1 metrics of a run" in run("eval", folder / "run", folder, "--json", "--on-error", "skip").stderr
    shutil.rmtree(folder / "run" / "step-00000002")
    run(*command, "--resume")


def test_resume_of_a_blt_without_a_checkpoint_needs_its_entropy_model(texts: Path, runs: Path, tmp_path: Path) -> None:
    run_ = tmp_path / "stopped"
    run_.mkdir()
    (run_ / "metrics.jsonl").write_text("{}\n")
    command = ("train", texts, "--run", run_, "--resume")
    assert "train: --entropy-model: expected a run or checkpoint, got none" in fails(*command)
    options = ("--row-tokens", 192, "--patch-size", 3, "--max-patch-length", 5, "--steps", 3, *SHARED)
    run(*command, "--entropy-model", runs / "entropy", *options)
    assert last_losses(run_) == last_losses(runs / "blt")


def test_a_resumed_run_has_the_options_of_the_run(texts: Path, runs: Path, tmp_path: Path) -> None:
    """It goes on exactly, as the metrics show, whether its options are given again or left out."""
    for options in ((), ("--row-tokens", 256, "--steps", 4, *SHARED)):
        run_ = tmp_path / f"copy {len(options)}"
        shutil.copytree(runs / "entropy", run_)
        shutil.rmtree(run_ / "step-00000004")
        run("train-entropy", texts, "--run", run_, "--resume", *options, "--eval-every", 3)
        assert last_losses(run_) == last_losses(runs / "entropy")
    before = (runs / "blt" / "metrics.jsonl").read_bytes()
    run("train", texts, "--run", runs / "blt", "--resume")
    run("train", texts, "--run", runs / "blt", "--resume", "--entropy-model", runs / "blt" / ".." / "entropy")
    assert (runs / "blt" / "metrics.jsonl").read_bytes() == before


CHANGES: dict[str, tuple[object, object]] = {  # option: what the run has, what is given
    "steps": (3, 2000),
    "threshold": ("auto", "1.0"),
    "patch-size": (3.0, 4.0),
    "rule": ("threshold", "monotonic"),
    "delta": (None, 0.5),
    "max-patch-length": (5, 6),
    "preset": ("tiny", "1B"),
    "row-tokens": (192, 100),
    "longest-sequence": (None, 24),
    "row-patches": (None, 33),
    "seed": (0, 1),
    "learning-rate": (0.002, 0.1),
    "table-learning-rate": (0.03, 0.1),
    "holdout-bytes": (1000, 2000),
    "text-key": ("text", "content"),
    "on-error": ("skip", "raise"),
    "max-document-bytes": (65536, 100),
}


def test_every_setting_that_a_resumed_run_would_change_is_named(texts: Path, runs: Path) -> None:
    command = ("train", texts, "--run", runs / "blt", "--resume")
    given = [part for name, (_, value) in CHANGES.items() for part in (f"--{name}", value)]
    message = fails(*command, *given, "--autocast", "--include", "*.txt", "--entropy-model", runs / "blt")
    for name, (saved, value) in CHANGES.items():
        assert f"--{name}: the run has {saved}, got {value}" in message
    assert "--autocast: the run has False, got True" in message
    assert "--include: the run has" in message and "--entropy-model: the run has" in message
    assert threshold_or_auto("1") == threshold_or_auto("1.0") != threshold_or_auto("auto")
    one = fails("train-entropy", texts, "--run", runs / "entropy", "--resume", "--preset", "100M")
    assert one.endswith("/entropy: a resumed run keeps its settings: --preset: the run has tiny, got 100M\n")


def test_a_run_of_another_command_or_on_other_text_is_not_resumed(texts: Path, runs: Path) -> None:
    message = fails("train", texts, "--run", runs / "entropy", "--resume")
    assert "expected a run of `blt-kernels train`, got one of `blt-kernels train-entropy`" in message
    message = fails("train-entropy", texts / "0.txt", "--run", runs / "entropy", "--resume")
    assert f"the run was trained on other text than {texts / '0.txt'}" in message


@pytest.mark.filterwarnings("ignore:ppmd is left out")
def test_an_interrupted_demo_goes_on(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in (("ENTROPY", RowShape(1024, 256)), ("MAIN", RowShape(1024, 256))):
        monkeypatch.setattr(demo, name, dataclasses.replace(getattr(demo, name), shape=shape))
    monkeypatch.setattr(runs_, "WATCHED_BYTES", 1)  # one batch: there are ten evaluations of each model
    run_ = tmp_path / "demo"
    command = ("demo", "--run", run_, "--data", texts / "0.txt", "--data", texts / "1.txt", "--minutes", 0.001)
    with monkeypatch.context() as patch:
        patch.setattr(demo, "entropy_patcher", interrupt)
        assert run(*command, check=False).returncode == 130
    trained = metrics(run_ / "entropy")
    assert "model of a demo with --minutes 0.001, --seed 0 is here already" in fails(*command, "--seed", 1)
    assert "entropy model: step 20/20" not in run(*command).stdout
    assert metrics(run_ / "entropy") == trained
    result = json.loads((run_ / "result.json").read_text())
    assert {"BLT", "entropy model", "gzip -9"} <= result["bits_per_byte"].keys()
    assert len(result["sample"]["text"]) <= result["sample"]["num_bytes"] <= 400
    written = ["blt", "entropy", "loss.png", "patches.html", "patches.png", "result.json"]
    assert sorted(path.name for path in run_.iterdir()) == written
    assert "the results of a demo are here already" in fails(*command)


# What goes wrong


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "nowhere", "nothing.txt"), "no such file"),
        (("train-entropy", "nothing.txt", "--run", "r"), "no such file"),
        (("patch", "--model", "nowhere"), "expected a text or --file, got neither"),
        (("patch", "x", "--model", "nowhere"), "nowhere: no checkpoint here: there is no such directory"),
        (("patch", "x", "--model", "nowhere", "--png", "no/p.png"), "patch: --png: expected a file in a directory"),
        (("patch", "x", "--model", "nowhere", "--html", "."), "patch: --html: expected a file in a directory"),
        (("flops", "--preset", "8B"), "BLTConfig: preset: expected one of 'tiny', '400M', '1B', '7B', got '8B'"),
        (("flops", "--context", "2"), "blt_flops: context_bytes: expected a finite number of at least 4.5, got 2"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(*arguments)
    assert not list(tmp_path.iterdir())


def test_files_and_runs_that_do_not_fit_are_one_line(
    runs: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    patch = ("patch", "--model", runs / "entropy", "--threshold", "1")
    for command, named in (
        ((*patch, "--file", tmp_path / "none.txt"), "none.txt: No such file"),
        ((*patch, "--file", tmp_path), "Is a directory"),
        ((*patch, "x" * 5000, "--png", tmp_path / "p.png"), "patch: --png: expected at most 4800 tokens"),
        (("train-entropy", texts / "0.txt", "--run", tmp_path / "file" / "run"), "file: a file is in the way"),
        (("train-entropy", texts / "0.txt", "--run", tmp_path / "file", "--resume"), "file: a file is in the way"),
        (("demo", "--data", texts / "0.txt", "--run", tmp_path / "file"), "file: a file is in the way"),
        (("eval", tmp_path / "file", texts / "0.txt"), "file: no checkpoint here: this is a file"),
        (("calibrate", texts / "0.txt", "--entropy-model", runs / "blt"), "expected an entropy model, got a BLT"),
        (("calibrate", texts / "0.txt", "--entropy-model", runs / "entropy", "--rule", "sum"), "rule: expected one of"),
        (("patch", "x", "--model", runs / "entropy"), "patch: --threshold: expected a number"),
    ):
        assert named in fails(*command)
    monkeypatch.setattr("os.access", lambda path, mode, **options: mode != os.W_OK)
    assert "no permission to write" in fails("train-entropy", texts / "0.txt", "--run", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


NUMBERS = {
    "--steps": ["0", "-1", "100000000", "1.5"],
    "--longest-sequence": ["0", "-1", "99999999999"],
    "--row-tokens": ["0", "99999999999"],
    "--row-patches": ["0", "99999999999"],
    "--learning-rate": ["0", "-1", "nan", "inf"],
    "--table-learning-rate": ["0", "nan"],
    "--patch-size": ["0", "nan", "inf", "1e300"],
    "--threshold": ["nan", "inf", "high"],
    "--delta": ["nan", "-inf"],
    "--max-patch-length": ["0", "99999999999"],
    "--max-document-bytes": ["3", "-1", "9" * 30],
    "--holdout-bytes": ["0", "-5", "9" * 30],
    "--eval-every": ["0"],
    "--checkpoint-every": ["0"],
    "--seed": ["9223372036854775808", "-9223372036854775809", "0.5"],
}


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [("train", option, value) for option, values in NUMBERS.items() for value in values]
    + [("demo", "--minutes", value) for value in ("-1", "0", "nan", "inf", "1e300")]
    + [("demo", "--seed", "9" * 20)]
    + [("flops", "--patch-size", value) for value in ("0", "nan", "inf")]
    + [("flops", "--context", value) for value in ("0", "-1", "9" * 30)]
    + [("patch", "--threshold", value) for value in ("nan", "inf")]
    + [("calibrate", "--patch-size", "nan"), ("calibrate", "--delta", "nan")]
    + [("eval", "--max-document-bytes", "0")]
    + [("train-entropy", option, NUMBERS[option][0]) for option in ("--steps", "--row-tokens", "--seed")],
)
def test_numbers_out_of_range_are_refused_by_the_name_of_the_option(command: str, option: str, value: str) -> None:
    required = {
        "train": ("data", "--run", "run"),
        "train-entropy": ("data", "--run", "run"),
        "patch": ("text", "--model", "run"),
        "calibrate": ("data", "--entropy-model", "run"),
        "eval": ("run", "data"),
    }.get(command, ())
    result = run(command, *required, f"{option}={value}", check=False)
    assert result.returncode == 2 and f"'{option}'" in result.stderr, result.stderr


def test_wrong_use_stays_a_usage_error() -> None:
    for arguments in (("nonsense",), ("flops", "--nonsense"), ("flops", "[/INST]"), ("train",), ("flops", "--[/x]")):
        result = run(*arguments, check=False)
        assert result.returncode == 2 and "Traceback" not in result.stderr and not result.stdout


def damaged_state(**changes: Any) -> Any:
    def damage(checkpoint: Path) -> None:
        """State that another version could write: whole, and not what this one reads."""
        import hashlib

        record = json.loads((checkpoint / "state.json").read_text())
        for name, value in changes.items():
            if value is ...:
                del record["state"][name]
            else:
                record["state"][name] = value
        del record["sha256"]
        record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        (checkpoint / "state.json").write_text(json.dumps(record))

    return damage


LAYERS = {"dim": 64, "num_layers": 2, "num_heads": 2, "ffn_dim": 192, "window": 64}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors: missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "model.safetensors: expected"),
        (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors: missing"),
        (lambda path: (path / "state.json").unlink(), "state.json: cannot be read"),
        (lambda path: (path / "state.json").write_text("[" * 99999), "state.json: not JSON"),
        (damaged_state(kind=...), "state.json: cannot be used"),
        (damaged_state(model=7), "state.json: cannot be used"),
        (damaged_state(model={"transformer": LAYERS | {"dim": "64"}}), "state.json: cannot be used"),
        (damaged_state(model={"transformer": LAYERS | {"ffn_dim": 191}}), "model.safetensors: does not fit the model"),
        (
            damaged_state(model={"transformer": LAYERS | {"ffn_dim": 10**12}}),
            "model.safetensors: does not fit the model",
        ),
        (damaged_state(patcher={"config": {"threshold": "1"}, "entropy_model": None}), "state.json: cannot be used"),
        (damaged_state(notes=None), "does not say in rows of which shape"),
        (damaged_state(notes={"rows": [0, -1, None]}), "does not say in rows of which shape"),
    ],
)
def test_damaged_checkpoints_are_one_line_that_names_the_file(
    damage: Any, named: str, runs: Path, texts: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "entropy" / "step-00000004", tmp_path / "run" / "step-00000004")
    damage(tmp_path / "run" / "step-00000004")
    assert named in fails("eval", tmp_path / "run", texts / "0.txt")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damaged_state(notes=...), "got one of another program"),
        (damaged_state(notes=[]), "got one of another program"),
        (
            damaged_state(notes={"command": "train-entropy", "options": 7}),
            "expected a run of `blt-kernels train-entropy`",
        ),
        (damaged_state(train={}), "made with other training settings"),
        (damaged_state(train=None), "state.json: cannot be used"),
        (damaged_state(lanes={}), "state.json: cannot be used"),
        (damaged_state(optimizer=[]), "state.json: cannot be used"),
        (damaged_state(bytes_seen=...), "state.json: cannot be used"),
    ],
)
def test_damaged_checkpoints_are_not_resumed(damage: Any, named: str, runs: Path, texts: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "entropy", tmp_path / "run")
    damage(tmp_path / "run" / "step-00000004")
    assert named in fails("train-entropy", texts, "--run", tmp_path / "run", "--resume")
    assert metrics(tmp_path / "run") == metrics(runs / "entropy")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory"),
        (KeyError("key"), "KeyError: 'key' (BLT_KERNELS_DEBUG=1 shows where)"),
        (
            ZeroDivisionError("division by zero"),
            "ZeroDivisionError: division by zero (BLT_KERNELS_DEBUG=1 shows where)",
        ),
        (OSError(28, "No space left on device", "file"), "file: No space left on device"),
        (ValueError("a\nb \x1b[31m [/INST]"), "a b \\x1b[31m [/INST]"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "'utf-8' codec can't decode byte 0xff"),
        (RecursionError("too deep"), "too deep"),
    ],
)
def test_whatever_goes_wrong_is_one_line(error: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(look, "load_any", fail)
    assert line in fails("patch", "x", "--model", "run")
    monkeypatch.setenv("BLT_KERNELS_DEBUG", "1")
    with pytest.raises(type(error)):
        run("patch", "x", "--model", "run")


def test_an_interruption_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "load_any", interrupt)
    result = run("patch", "x", "--model", "run", check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_output_without_utf8_loses_nothing(runs: Path) -> None:
    result = run("patch", "日\n", "--model", runs / "entropy", "--threshold", 50, encoding="ascii")
    assert "\\u65e5" in result.stdout
    assert "BLT" not in run("eval", "nowhere", "日", check=False, encoding="ascii").stdout


@pytest.mark.parametrize("reader", ["closed pipe", "full disk"])
def test_output_that_nobody_takes(reader: str) -> None:
    """A pipe into `head` ends in silence; a full disk is said, once."""
    command = [sys.executable, "-c", "from blt_kernels.cli.main import main; main()", "flops"]
    if reader == "closed pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    os.close(write)
    assert result.returncode == 1
    expected = "" if reader == "closed pipe" else "blt-kernels: standard output: No space left on device\n"
    assert result.stderr == expected


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closed_output_is_no_error(stream: str) -> None:
    code = "import sys; from blt_kernels.cli.main import main; main()"
    command = [sys.executable, "-c", f"import sys; sys.{stream} = None; {code}", "flops"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and bool(result.stdout) == (stream == "stderr")


def test_a_warning_is_one_line(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text\n" * 20) + b"junk")
    result = run("eval", runs / "entropy", tmp_path, "--json")
    assert result.stderr == f"warning: {tmp_path}/a.txt.gz: what follows the gzip data is ignored\n"
    json.loads(result.stdout)


# Text is text


def test_text_of_users_is_never_markup() -> None:
    text = "[/INST] [red]x[/red] :smile: https://x"
    for settings in ({"markup": False, "emoji": False, "highlight": False}, {}):
        console = Console(file=io.StringIO(), width=120, **settings)  # type: ignore[arg-type]
        with training_progress(console, text, 1) as on_step:
            on_step({"step": 1, "bits_per_byte": 8.0, "bytes_per_second": 1.0})
        assert text in console.file.getvalue()  # type: ignore[attr-defined]
    file = io.StringIO()
    with contextlib.redirect_stdout(file):
        print_bits(cli.console, text, {text: 1.0})
    assert file.getvalue().count(text) == 2
    bar = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    with training_progress(bar, "[/INST] [red]x", 1) as on_step:
        on_step({"step": 1, "bits_per_byte": 8.0, "bytes_per_second": 1.0})
    assert "[/INST] [red]x" in bar.file.getvalue()  # type: ignore[attr-defined]


def test_what_could_drive_a_terminal_is_escaped() -> None:
    assert printable("a\x1b[2J\n\u202e\udcff\x07日é") == "a\\x1b[2J\\n\\u202e\\udcff\\x07日é"
    assert describe(OSError(13, "Permission denied", "a\nb")) == "a b: Permission denied"


# Devices


@pytest.mark.parametrize(
    "command",
    [
        ("train-entropy", "DATA", "--run", "RUN"),
        ("calibrate", "DATA", "--entropy-model", "RUN"),
        ("train", "DATA", "--run", "RUN", "--entropy-model", "RUN"),
        ("eval", "RUN", "DATA"),
        ("patch", "text", "--model", "RUN"),
        ("generate", "RUN"),
        ("demo", "--run", "RUN"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_computes_takes_a_device(
    command: tuple[str, ...], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    places = {"DATA": texts, "RUN": tmp_path / "run"}
    line = fails(*(places.get(word, word) for word in command), "--device", "cuda")
    assert "device: expected cpu, because torch sees no GPU here, got cuda" in line


def test_the_device_does_not_decide_the_run(texts: Path, tmp_path: Path) -> None:
    arguments = ("train-entropy", texts, "--run", tmp_path / "run", "--row-tokens", 128, "--steps", 2, *SHARED)
    run(*arguments, "--device", "cpu")
    assert "device" not in json.loads((tmp_path / "run" / "step-00000002" / "state.json").read_text())["state"]["notes"]
    run(*arguments, "--device", "auto", "--resume")


# Ways of patching


@pytest.mark.parametrize(
    ("options", "says", "mean"),
    [
        (("--patching", "spaces"), "patches end at spaces, ", None),
        (("--patching", "spaces", "--max-patch-length", 3), "patches end at spaces, ", None),
        (("--patching", "fixed", "--patch-size", 4), "patches of 4 bytes, ", 4),
    ],
    ids=["spaces", "short", "fixed"],
)
def test_patches_without_an_entropy_model(
    options: tuple[object, ...], says: str, mean: float | None, texts: Path, tmp_path: Path
) -> None:
    arguments = ("train", texts, "--run", tmp_path / "run", "--row-tokens", 192, "--checkpoint-every", 1, *SHARED)
    assert says in run(*arguments, "--steps", 2, *options).stdout
    state = json.loads((tmp_path / "run" / "step-00000002" / "state.json").read_text())["state"]
    assert state["patcher"]["config"]["method"] == options[1] and state["patcher"]["entropy_model"] is None
    found = 192 / state["notes"]["rows"]["row_patches"]  # measured with this patcher
    assert found == pytest.approx(mean, rel=0.1) if mean else 1 < found < 8
    expected = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00000002")
    run("train", texts, "--run", tmp_path / "run", "--resume", *SHARED)
    for line, wanted in zip(metrics(tmp_path / "run"), expected, strict=True):
        assert line["loss"] == wanted["loss"]
    assert "BLT" in run("eval", tmp_path / "run", texts / "0.txt").stdout
    assert "patches" in run("patch", "some text", "--model", tmp_path / "run").stdout


def test_options_of_another_way_of_patching_are_refused_by_name(texts: Path, runs: Path, tmp_path: Path) -> None:
    start = ("train", texts, "--run", tmp_path / "run", "--patching")
    for options, line in (
        (("spaces", "--entropy-model", runs / "entropy"), "--entropy-model: expected with --patching entropy alone"),
        (("spaces", "--threshold", 1), "--threshold: expected with --patching entropy alone, got --patching spaces"),
        (("fixed", "--rule", "monotonic"), "--rule: expected with --patching entropy alone, got --patching fixed"),
        (("fixed", "--delta", 1), "--delta: expected with --patching entropy alone"),
        (("fixed", "--reset-at-newline"), "--reset-at-newline: expected with --patching entropy alone"),
        (
            ("spaces", "--patch-size", 4),
            "--patch-size: expected with --patching entropy or fixed alone, got --patching",
        ),
        (("fixed",), "--patch-size: expected a whole number with --patching fixed, got 4.5"),
        (("words",), "--patching: expected one of"),
        (("entropy",), "--entropy-model: expected a run or checkpoint, got none"),
    ):
        assert line in fails(*start, *options)
    assert not (tmp_path / "run").exists()


def test_entropies_by_lines_from_calibration_to_a_resumed_run(texts: Path, runs: Path, tmp_path: Path) -> None:
    model = ("--entropy-model", runs / "entropy")
    arguments = (texts, *model, "--patch-size", 3, "--on-error", "skip", "--reset-at-newline")
    threshold = run("calibrate", *arguments).stdout
    assert threshold != run("calibrate", *arguments[:-1]).stdout
    options = ("--row-tokens", 192, "--steps", 2, "--checkpoint-every", 1, "--holdout-bytes", 1000)
    begun = run("train", *arguments, "--run", tmp_path / "run", *options)
    assert f"threshold {float(threshold):.6f} nats" in begun.stdout
    state = json.loads((tmp_path / "run" / "step-00000002" / "state.json").read_text())["state"]
    assert state["patcher"]["config"]["reset_at_newline"] is True
    expected = last_losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00000002")
    run("train", texts, "--run", tmp_path / "run", "--resume", "--on-error", "skip", "--holdout-bytes", 1000)
    assert last_losses(tmp_path / "run") == expected
