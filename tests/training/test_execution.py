"""Compiled and checkpointed training is training; batches are made ahead in a thread that disturbs nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_no_recompile
from torch._dynamo.utils import counters

from blt_kernels.data import Corpus
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.training import execution
from blt_kernels.training.execution import prepare
from blt_kernels.training.optim import OptimConfig
from blt_kernels.training.patcher import Patcher, PatcherConfig
from blt_kernels.training.prefetch import prefetch
from blt_kernels.training.rows import RowShape
from blt_kernels.training.runs import train_model
from blt_kernels.training.trainer import METRICS_FILE, TrainConfig

LOCAL = TransformerConfig(16, 1, 2, 32, window=16)
BLT_CONFIG = BLTConfig(LOCAL, TransformerConfig(32, 1, 2, 64), LOCAL, ngram_sizes=(3,), hash_rows=97)
CONFIG = TrainConfig(8, OptimConfig(warmup_steps=3), log_every=1, eval_every=4, checkpoint_every=6, seed=1)
COMPILED = dataclasses.replace(CONFIG, compile=True)
NAMES = ["entropy", "blt"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"{i:02}.txt").write_text("".join(f"value_{j} = {i * j} + {j}\n" for j in range(5 + 7 * i)))
    return Corpus(folder)


@pytest.fixture
def quick_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced and guarded is the same as with inductor, whose code takes a minute to make."""
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")


def train(name: str, corpus: Corpus, run: Path, config: TrainConfig, **options: Any) -> list[dict[str, Any]]:
    """The metrics of a run. Sequences and patches differ from batch to batch."""
    torch.manual_seed(0)
    if name == "blt":
        patcher, shape = Patcher(PatcherConfig("spaces")), RowShape(256, 48, 80)
        train_model(BLT(BLT_CONFIG), corpus, corpus, shape, config, run, patcher=patcher, **options)
    else:
        train_model(EntropyModel(EntropyModelConfig(LOCAL)), corpus, corpus, RowShape(256, 48), config, run, **options)
    return [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]


def assert_alike(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        for key in {"loss", "gradient_norm", "held_out_bits_per_byte"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), (theirs["step"], key)


@pytest.mark.usefixtures("quick_backend")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_compiled_once(name: str, corpus: Corpus, tmp_path: Path) -> None:
    """One graph in the first step, none for other batches, after an evaluation, or for the evaluation itself."""
    with assert_no_recompile():
        counters.clear()
        got = train(name, corpus, tmp_path / "compiled", COMPILED)
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert_alike(got, train(name, corpus, tmp_path / "eager", CONFIG))


@pytest.mark.usefixtures("quick_backend")
def test_another_way_to_compute_resumes_a_run(corpus: Corpus, tmp_path: Path) -> None:
    whole = train("blt", corpus, tmp_path / "whole", CONFIG)

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("blt", corpus, tmp_path / "run", COMPILED, on_step=interrupt)
    other = dataclasses.replace(CONFIG, checkpoint_activations=True)
    assert_alike(train("blt", corpus, tmp_path / "run", other, resume=True), whole)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_training_is_the_same_to_the_bit(name: str, corpus: Corpus, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_activations=True)
    got, expected = train(name, corpus, tmp_path / "again", config), train(name, corpus, tmp_path / "kept", CONFIG)
    assert [line["loss"] for line in got] == [line["loss"] for line in expected]


def test_many_ranks_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="train: compile: expected False on many ranks"):
        prepare(BLT(BLT_CONFIG), compiled=True, checkpointed=False)


@pytest.mark.usefixtures("quick_backend")
def test_a_model_that_was_compiled_can_train_uncompiled() -> None:
    model = EntropyModel(EntropyModelConfig(LOCAL))
    for compiled in (True, False):
        prepare(model, compiled=compiled, checkpointed=False)
        counters.clear()
        model(torch.zeros(1, 8, dtype=torch.int64))
        assert counters["stats"]["unique_graphs"] == int(compiled)


class Counting:
    """Stands for the lanes of a run: counts, and remembers the thread and the stream in which it did."""

    def __init__(self) -> None:
        self.number = 0
        self.made: list[tuple[int, object]] = []
        self.stream: object = None

    def __next__(self) -> list[int]:
        if self.number == 4:
            raise StopIteration
        self.number += 1
        self.made.append((threading.get_ident(), self.stream))
        return [self.number]

    def state_dict(self) -> list[int]:
        return [self.number]


def test_reading_ahead_begins_with_the_second_step() -> None:
    """torch.compile is busy in the first one, and other threads believe that they are being compiled."""
    lanes = Counting()
    with contextlib.closing(prefetch(lanes, ahead=True)) as taken:  # type: ignore[arg-type]
        assert next(taken) == ([1], [1])  # type: ignore[comparison-overlap]
        assert lanes.number == 1 and lanes.made[0][0] == threading.get_ident()
        assert [position for _, position in taken] == [[2], [3], [4]]  # type: ignore[comparison-overlap]
    assert {thread for thread, _ in lanes.made[1:]}.isdisjoint({threading.get_ident()})
    assert list(prefetch(lanes, ahead=True)) == []  # type: ignore[arg-type]


def test_the_thread_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for CUDA, on which this has not run yet."""
    lanes, waited = Counting(), []

    class Stream:
        def __init__(self, device: torch.device):
            self.device = device

        def wait_stream(self, other: object) -> None:
            waited.append(other)

    @contextlib.contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        lanes.stream = stream
        yield
        lanes.stream = None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the step's on {device}")
    device = torch.device("cuda", 1)
    assert len(list(prefetch(lanes, ahead=True, device=device))) == 4  # type: ignore[arg-type]
    streams = [stream for _, stream in lanes.made]
    assert streams[0] is None and len(set(streams[1:])) == 1
    assert isinstance(streams[1], Stream) and streams[1].device == device
    assert waited == ["the step's on cuda:1"]
