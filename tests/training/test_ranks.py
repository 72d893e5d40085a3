"""Many ranks compute what one does, in real processes: gradients, losses, checkpoints. A killed one costs little."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import rank_worker as worker
import torch

from blt_kernels.cli.main import main
from blt_kernels.data import Corpus
from blt_kernels.model import BLT
from blt_kernels.training.costs import rank_costs
from blt_kernels.training.evaluate import bits_per_byte, held_out_batches
from blt_kernels.training.load import load_model
from blt_kernels.training.ranks import lanes_of_rank
from blt_kernels.training.sharded_tables import table_group_size
from blt_kernels.training.trainer import METRICS_FILE

REPOSITORY = Path(__file__).parents[2]


def start(ranks: int, arguments: Sequence[object]) -> list[subprocess.Popen[str]]:
    """Python processes with the environment that torchrun gives to those of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each; none is left behind."""
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def run_worker(ranks: int, folder: Path) -> None:
    for status, _, err in finish(start(ranks, (worker.__file__, folder))):
        assert status == 0, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two ranks have computed: the runs `one-*`, `two-*`, begun by one `one-then-two-*`, and
    begun by two `two-again-*`."""
    folder = tmp_path_factory.mktemp("ranks")
    worker.make_corpus(folder / "texts")
    corpus = Corpus(folder / "texts")
    for name in worker.CONFIGS:
        worker.train(corpus, folder / f"one-{name}", name)
        worker.begin_again(folder / f"one-{name}", folder / f"one-then-two-{name}")
    run_worker(2, folder)
    return folder


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS_FILE).open()]


def assert_same_run(run: Path, expected: Path) -> None:
    """The same losses to 1e-4, and the same weights as far as rounding lets them."""
    lines, wanted = metrics(run), metrics(expected)
    assert [line["step"] for line in lines] == list(range(1, worker.STEPS + 1))
    for ours, theirs in zip(lines, wanted, strict=True):
        for name in ("loss", "gradient_norm", "bits_per_byte"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        assert [ours[name] for name in ("bytes", "bytes_per_patch")] == [
            theirs[name] for name in ("bytes", "bytes_per_patch")
        ]
    held_out = "held_out_bits_per_byte"
    assert lines[-1][held_out] == pytest.approx(wanted[-1][held_out], rel=1e-4)
    assert wanted[0]["loss"] - wanted[-1]["loss"] > 1  # it is a run that learns
    weights, wanted_weights = (load_model(path)[0].state_dict() for path in (run, expected))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted_weights[name], rtol=1e-2, atol=1e-3)


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() - {"held"} == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape and expected.count_nonzero() > 0, name
        scale = expected.double().norm()
        assert (ours[name].double() - expected.double()).norm() < tolerance * scale, name


@pytest.mark.parametrize("dim", worker.MODELS)
def test_gradients_are_those_of_one_process(dim: int, folder: Path) -> None:
    """Tables whose columns are divided, and tables of which each rank has a copy; documents end within the rows."""
    expected = worker.gradients(Corpus(folder / "texts"), dim)
    assert_same_gradients(torch.load(folder / f"gradients-{dim}.pt"), expected, 1e-5)


@pytest.mark.parametrize("dim", worker.MODELS)
def test_a_rank_holds_what_the_costs_on_paper_say(dim: int, folder: Path) -> None:
    held = torch.load(folder / f"gradients-{dim}.pt")["held"]
    costs = rank_costs(worker.MODELS[dim], 2, row_tokens=288, table_optimizer="sparse_adam")
    expected = [
        costs.memory["layers"] + costs.memory["tables"],
        costs.memory["optimiser of layers"] + costs.memory["optimiser of tables"],
    ]
    assert held.tolist() == [expected, expected]


def test_gradients_under_autocast_are_those_of_one_process(folder: Path) -> None:
    """Weights that travel in bfloat16 are those that autocast makes, and nothing else is rounded."""
    corpus = Corpus(folder / "texts")
    expected = worker.gradients(corpus, 16, autocast=True)
    assert_same_gradients(torch.load(folder / "gradients-autocast.pt"), expected, 5e-3)
    ours, plain = torch.load(folder / "gradients-autocast.pt")["loss"], worker.gradients(corpus, 16)["loss"]
    assert abs(ours - expected["loss"]) < 1e-5 < abs(plain - expected["loss"])


@pytest.mark.parametrize("name", worker.CONFIGS)
def test_two_ranks_train_as_one_process_does(name: str, folder: Path) -> None:
    assert_same_run(folder / f"two-{name}", folder / f"one-{name}")


@pytest.mark.parametrize("name", worker.CONFIGS)
def test_two_ranks_go_on_with_the_run_of_one(name: str, folder: Path) -> None:
    assert_same_run(folder / f"one-then-two-{name}", folder / f"one-{name}")


@pytest.mark.parametrize("name", worker.CONFIGS)
def test_one_process_goes_on_with_the_run_of_two_ranks(name: str, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    worker.begin_again(folder / f"two-{name}", run)
    worker.train(Corpus(folder / "texts"), run, name, resume=True)
    assert_same_run(run, folder / f"one-{name}")


@pytest.mark.parametrize("name", worker.CONFIGS)
def test_two_ranks_resume_exactly(name: str, folder: Path) -> None:
    """To the bit: the checkpoint has what each rank had, also of state that all ranks hold whole."""
    runs = folder / f"two-{name}", folder / f"two-again-{name}"
    whole, resumed = ([(line["loss"], line["gradient_norm"]) for line in metrics(run)] for run in runs)
    assert resumed == whole
    weights, ours = (load_model(run)[0].state_dict() for run in runs)
    assert all(torch.equal(ours[key], weight) for key, weight in weights.items())


def test_what_ranks_have_written_is_read_like_any_checkpoint(folder: Path) -> None:
    run = folder / "two-rowwise_adagrad"
    names = [sorted(path.name for path in (folder / f"{which}-rowwise_adagrad").rglob("*")) for which in ("one", "two")]
    assert names[0] == names[1]
    model, patcher, _ = load_model(run)
    assert isinstance(model, BLT) and patcher is not None
    corpus = Corpus(folder / "texts")
    bits, _ = bits_per_byte(model, held_out_batches(corpus.with_files(corpus.files[:3]), worker.SHAPE, patcher))
    assert bits == pytest.approx(metrics(run)[-1]["held_out_bits_per_byte"], rel=1e-4)


def test_the_entropy_model_trains_on_ranks_with_its_tables(folder: Path) -> None:
    lines = metrics(folder / "entropy")
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    model, _, _ = load_model(folder / "entropy")
    assert model.hash_tok_embedding.weight.count_nonzero() > 0


def test_lanes_that_ranks_do_not_divide_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.load(folder / "refused.pt")
    assert first[0] == second[0] == "ValueError: train: lanes: expected a multiple of the 2 ranks of torchrun, got 3"
    monkeypatch.setattr("blt_kernels.training.ranks.world_size", lambda: 4)
    monkeypatch.setattr("blt_kernels.training.ranks.rank", lambda: 3)
    assert lanes_of_rank(8) == range(6, 8)


def test_what_only_rank_0_can_know_it_alone_says(folder: Path) -> None:
    first, second = torch.load(folder / "refused.pt")
    assert "there is a run here already" in first[1]
    assert second[1].startswith("FirstRankFailedError")


def test_a_rank_that_cannot_write_leaves_no_part_of_a_checkpoint(folder: Path) -> None:
    first, second = torch.load(folder / "refused.pt")
    assert first[2] == second[2]
    assert first[2].startswith(f"{folder}/full-disk/step-00000010: cannot be written (rank 1: ")
    assert [path.name for path in (folder / "full-disk").iterdir()] == [METRICS_FILE]


@pytest.mark.parametrize(
    ("dim", "ranks", "size"),
    [(1024, 8, 8), (1024, 64, 64), (1024, 256, 128), (1280, 64, 64), (32, 8, 4), (32, 3, 1), (8, 2, 1), (7, 7, 1)],
)
def test_a_table_group_keeps_eight_columns_a_rank(dim: int, ranks: int, size: int) -> None:
    assert table_group_size(dim, ranks) == size


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`blt-kernels` in this process."""
    monkeypatch.setattr(sys, "argv", ["blt-kernels", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code


def test_a_killed_rank_costs_what_came_after_the_last_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The survivor says so in one line, and one process ends the run with the losses of a run that nobody disturbed."""
    options = ("--row-tokens", 256, "--lanes", 2, "--holdout-bytes", 500, "--checkpoint-every", 3, "--steps", 30)
    run, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = ("train-entropy", folder / "texts", *options, "--run")
    processes = start(2, ("-m", "blt_kernels", *arguments, run))
    try:
        until = time.monotonic() + 200
        while not list(run.glob("step-*")):
            assert time.monotonic() < until and processes[0].poll() is None, finish(processes)
            time.sleep(0.01)
    finally:
        processes[1].send_signal(signal.SIGKILL)
    (status, _, err), _ = finish(processes)
    assert status == 1 and err.count("\n") == 1, err
    assert err.startswith("blt-kernels: rank 0 of 2 stops, because another rank has ended; the last checkpoint stands")
    saved = [int(path.name.removeprefix("step-")) for path in run.glob("step-*")]
    assert 3 <= max(saved) < 30
    command_line(monkeypatch, *arguments, run, "--resume")
    command_line(monkeypatch, *arguments, whole)
    assert [line["step"] for line in metrics(run)] == [10, 20, 30]
    for ours, theirs in zip(metrics(run), metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["bytes"] == theirs["bytes"]
