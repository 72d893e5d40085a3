"""Lanes: a global batch of several loaders, whose gradients are accumulated."""

from __future__ import annotations

import copy
import dataclasses
import json
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from blt_kernels.data import Corpus
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.training.checkpoint import CheckpointError
from blt_kernels.training.lanes import Lanes
from blt_kernels.training.optim import OptimConfig, Optimizers
from blt_kernels.training.patcher import Patcher, PatcherConfig
from blt_kernels.training.rows import RowShape
from blt_kernels.training.runs import train_model
from blt_kernels.training.step import loss_of, training_step
from blt_kernels.training.trainer import METRICS_FILE, TrainConfig

LOCAL = TransformerConfig(32, 1, 2, 64, window=16)
SMALL = BLTConfig(LOCAL, TransformerConfig(64, 1, 2, 64), LOCAL, ngram_sizes=(3, 4), hash_rows=97)
SHAPE = RowShape(288, 72, 96)
PATCHER = Patcher(PatcherConfig("spaces"))
CONFIG = TrainConfig(6, OptimConfig(warmup_steps=3), log_every=1, eval_every=6, checkpoint_every=2, lanes=3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(13):
        (folder / f"{i:02}.txt").write_text("".join(f"value_{i}_{j} = {i * j} + {j}\n" for j in range(5 + 7 * i)))
    return Corpus(folder)


def make_blt() -> BLT:
    torch.manual_seed(3)
    return BLT(SMALL)


def lanes_of(corpus: Corpus, num_lanes: int) -> Lanes:
    return Lanes.over(corpus, SHAPE, PATCHER, seed=1, num_lanes=num_lanes, mine=range(num_lanes))


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.to_dense() for parameter in model.parameters()]  # type: ignore[union-attr]


def test_gradients_are_of_the_mean_over_all_targets(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of the mean of the means of batches, which are not equally full."""
    batches = next(lanes_of(corpus, 2))
    half = batches[1].targets.shape[1] // 2
    batches[1].targets[0, half:] = -100
    model = make_blt()
    losses = [loss_of(model, batch) for batch in batches]
    ((losses[0].total + losses[1].total) / (losses[0].num_targets + losses[1].num_targets)).backward()
    expected = gradients(model)
    monkeypatch.setattr(Optimizers, "step", lambda self: torch.zeros(()))
    accumulated = make_blt()
    loss, _ = training_step(accumulated, batches, Optimizers(accumulated, OptimConfig(), 1), autocast=False)
    for ours, theirs in zip(gradients(accumulated), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert loss.num_targets == losses[0].num_targets + losses[1].num_targets
    torch.testing.assert_close(loss.text_total, losses[0].text_total + losses[1].text_total)
    assert abs(loss.mean - (losses[0].mean + losses[1].mean) / 2) > 1e-5


def test_one_lane_is_the_mean_of_its_batch(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    [batch] = next(lanes_of(corpus, 1))
    plain = make_blt()
    expected = loss_of(plain, batch)
    expected.mean.backward()
    monkeypatch.setattr(Optimizers, "step", lambda self: torch.zeros(()))
    model = make_blt()
    loss, _ = training_step(model, [batch], Optimizers(model, OptimConfig(), 1), autocast=False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(model), gradients(plain), strict=True))
    assert [value.item() for value in loss] == [value.item() for value in expected]


def test_lanes_share_the_documents_and_read_none_twice(corpus: Corpus) -> None:
    lanes = lanes_of(corpus, 3)
    read: list[Counter[bytes]] = []
    for loader in lanes.loaders:
        loader.documents.epochs = 1
        read.append(Counter(loader.documents))
    assert all(len(documents) >= 13 // 3 for documents in read)
    assert sum(read, Counter()) == Counter(corpus)


def test_many_lanes_may_have_their_files_open(tmp_path: Path) -> None:
    """Each lane reads up to 32 files at a time, and the limit of a process is often 1024."""
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text("".join(f"line {j} of file {i}\n" for j in range(400)))
    text = Corpus(tmp_path, on_error="skip", max_document_bytes=100)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, before[1]))
    try:
        lanes = Lanes.over(text, RowShape(64, 16), None, seed=0, num_lanes=6, mine=range(6))
        for loader in lanes.loaders:
            loader.documents.buffer_documents = 50
        next(lanes)
        assert sum(len(loader.documents._readers) for loader in lanes.loaders) > 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not text.skipped.total


def test_a_run_of_lanes_resumes_exactly(corpus: Corpus, tmp_path: Path) -> None:
    whole = train_model(make_blt(), corpus, None, SHAPE, CONFIG, tmp_path / "whole", patcher=PATCHER)

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 5:
            raise KeyboardInterrupt

    run = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train_model(make_blt(), corpus, None, SHAPE, CONFIG, run, patcher=PATCHER, on_step=interrupt)
    resumed = train_model(make_blt(), corpus, None, SHAPE, CONFIG, run, patcher=PATCHER, resume=True)
    lines = [[json.loads(line) for line in (path / METRICS_FILE).open()] for path in (tmp_path / "whole", run)]
    assert [[line[name] for name in ("step", "bytes", "loss", "gradient_norm")] for line in lines[0]] == [
        [line[name] for name in ("step", "bytes", "loss", "gradient_norm")] for line in lines[1]
    ]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    other = dataclasses.replace(CONFIG, lanes=2)
    with pytest.raises(CheckpointError, match=r"other training settings: lanes: the run has 3, got 2$"):
        train_model(make_blt(), corpus, None, SHAPE, other, run, patcher=PATCHER, resume=True)


def test_metrics_count_all_lanes(corpus: Corpus, tmp_path: Path) -> None:
    batches = next(lanes_of(corpus, 3))
    logged: list[dict[str, Any]] = []
    config = dataclasses.replace(CONFIG, steps=1, seed=1)
    train_model(make_blt(), corpus, None, SHAPE, config, tmp_path, patcher=PATCHER, on_step=logged.append)
    assert logged[0]["bytes"] == sum(batch.num_bytes for batch in batches)
    patches = sum(batch.num_patches for batch in batches)
    assert logged[0]["bytes_per_patch"] == sum(batch.num_tokens for batch in batches) / patches


def test_the_entropy_model_has_lanes_too(corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EntropyModel(EntropyModelConfig(LOCAL))
    before = copy.deepcopy(model.state_dict())
    config = dataclasses.replace(CONFIG, steps=2, lanes=2)
    trainer = train_model(model, corpus, None, RowShape(128, 64), config, tmp_path)
    assert len(trainer.lanes.loaders) == 2
    assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)
