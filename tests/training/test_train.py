"""Training resumes exactly, refuses what does not fit, and counts bytes honestly."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch

from blt_kernels.cli.demo import documents_seen
from blt_kernels.data import Corpus, DocumentStream, PackedBatches, encode
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.training.checkpoint import CheckpointError, list_checkpoints
from blt_kernels.training.evaluate import bits_per_byte, held_out_batches
from blt_kernels.training.lanes import Lanes
from blt_kernels.training.load import load_model
from blt_kernels.training.optim import TABLE_OPTIMIZERS, OptimConfig
from blt_kernels.training.patcher import Patcher, PatcherConfig
from blt_kernels.training.prefetch import prefetch
from blt_kernels.training.rows import RowShape, mean_patch_length, patches_of_row
from blt_kernels.training.runs import (
    new_blt,
    new_entropy_model,
    open_run,
    train_model,
    without_metrics,
)
from blt_kernels.training.step import layout_of
from blt_kernels.training.trainer import METRICS_FILE, TrainConfig, Trainer

ENTROPY = EntropyModelConfig(TransformerConfig(32, 1, 2, 64, window=16))
BLT_SMALL = BLTConfig(
    encoder=TransformerConfig(32, 1, 2, 64, window=16),
    latent=TransformerConfig(64, 1, 2, 64),
    decoder=TransformerConfig(32, 1, 2, 64, window=16),
    ngram_sizes=(3, 4),
    hash_rows=97,
)
SHAPE = RowShape(288, 72, 72)
CONFIG = TrainConfig(12, OptimConfig(warmup_steps=3), log_every=1, eval_every=6, checkpoint_every=5, seed=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        text = f"# file {i}\n" + "".join(f"value_{j} = {i * j} + {j}\n" for j in range(5 + 7 * i))
        (folder / f"{i:02}.txt").write_text(text)
    return Corpus(folder)


@pytest.fixture(scope="module")
def patcher() -> Patcher:
    torch.manual_seed(0)
    return Patcher(PatcherConfig(threshold=5.5, max_patch_length=8), EntropyModel(ENTROPY))


def make_blt() -> BLT:
    torch.manual_seed(3)
    return BLT(BLT_SMALL)


def losses(run: Path) -> list[tuple[int, float, float, int]]:
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"], line["bytes"]) for line in lines]


def test_an_interrupted_run_continues_with_the_same_losses(corpus: Corpus, patcher: Patcher, tmp_path: Path) -> None:
    shape = SHAPE
    whole = train_model(make_blt(), corpus, None, shape, CONFIG, tmp_path / "whole", patcher=patcher)
    assert losses(tmp_path / "whole")[-1][0] == 12

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 8:
            raise KeyboardInterrupt

    run = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        train_model(make_blt(), corpus, None, shape, CONFIG, run, patcher=patcher, on_step=interrupt)
    assert [path.name for path in list_checkpoints(run)] == ["step-00000005"]
    assert losses(run)[-1][0] == 8
    torch.manual_seed(99)
    fresh = BLT(BLT_SMALL)  # other weights: everything must come from the checkpoint
    resumed = train_model(fresh, corpus, None, shape, CONFIG, run, patcher=patcher, resume=True)
    assert losses(run) == losses(tmp_path / "whole")
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_entropy_model_resumes_too(corpus: Corpus, tmp_path: Path) -> None:
    shape = RowShape(128, 64)
    torch.manual_seed(0)
    model = EntropyModel(ENTROPY)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_model(model, corpus, None, shape, CONFIG, tmp_path / "whole")

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 11:
            raise KeyboardInterrupt

    model.load_state_dict(state)
    with pytest.raises(KeyboardInterrupt):
        train_model(model, corpus, None, shape, CONFIG, tmp_path / "cut", on_step=interrupt)
    train_model(EntropyModel(ENTROPY), corpus, None, shape, CONFIG, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_blt_does_not_begin_with_what_its_entropy_model_has_read(
    corpus: Corpus, patcher: Patcher, tmp_path: Path
) -> None:
    """With one seed for both, as the commands have by default."""
    config = dataclasses.replace(CONFIG, steps=1)
    orders = []
    for model, cutter in ((EntropyModel(ENTROPY), None), (make_blt(), patcher)):
        run = tmp_path / type(model).__name__
        shape = RowShape(128, 64) if cutter is None else SHAPE
        trainer = train_model(model, corpus, None, shape, config, run, patcher=cutter)
        [state] = trainer.lanes.state_dict()
        orders.append([document["address"] for document in state["open"]])
    assert orders[0] != orders[1]


def test_a_step_learns(corpus: Corpus, patcher: Patcher, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=60, optim=OptimConfig(3e-3, 1e-2, warmup_steps=5))
    train_model(make_blt(), corpus, corpus, SHAPE, config, tmp_path / "run", patcher=patcher)
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    assert lines[0]["bits_per_byte"] > 7
    assert lines[-1]["bits_per_byte"] < 5
    assert lines[-1]["held_out_bits_per_byte"] < 5


def test_resume_refuses_another_model_schedule_and_damage(corpus: Corpus, patcher: Patcher, tmp_path: Path) -> None:
    run, shape = tmp_path / "run", SHAPE
    config = dataclasses.replace(CONFIG, steps=2)
    train_model(make_blt(), corpus, None, shape, config, run, patcher=patcher)
    wider = BLT(dataclasses.replace(BLT_SMALL, hash_rows=98))
    with pytest.raises(CheckpointError, match=r"other model settings: hash_rows: the run has 97, got 98$"):
        train_model(wider, corpus, None, shape, config, run, patcher=patcher, resume=True)
    longer = dataclasses.replace(config, steps=3, optim=OptimConfig(warmup_steps=3, eps=1e-6))
    with pytest.raises(
        CheckpointError, match=r"settings: optim\.eps: the run has 1e-08, got 1e-06; steps: the run has 2, got 3$"
    ):
        train_model(make_blt(), corpus, None, shape, longer, run, patcher=patcher, resume=True)
    mine = config.optim.table_optimizer
    (other,) = set(TABLE_OPTIMIZERS) - {mine}
    otherwise = dataclasses.replace(config, optim=dataclasses.replace(config.optim, table_optimizer=other))
    with pytest.raises(CheckpointError, match=rf"optim\.table_optimizer: the run has {mine}, got {other}$"):
        train_model(make_blt(), corpus, None, shape, otherwise, run, patcher=patcher, resume=True)
    oftener = dataclasses.replace(config, log_every=7, eval_every=1, checkpoint_every=1)  # decides no loss
    train_model(make_blt(), corpus, None, shape, oftener, run, patcher=patcher, resume=True)
    rows = dataclasses.replace(shape, row_tokens=shape.row_tokens + 8)
    with pytest.raises(CheckpointError, match=r"row settings: row_tokens: the run has 288, got 296$"):
        train_model(make_blt(), corpus, None, rows, config, run, patcher=patcher, resume=True)
    part = corpus.with_files(corpus.files[1:])
    with pytest.raises(CheckpointError, match="the run was trained on other text"):
        train_model(make_blt(), part, None, shape, config, run, patcher=patcher, resume=True)
    path = list_checkpoints(run)[-1] / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: expected \d+ bytes"):
        train_model(make_blt(), corpus, None, shape, config, run, patcher=patcher, resume=True)


@pytest.mark.parametrize(
    "left",
    [
        {},
        {METRICS_FILE: b""},
        {METRICS_FILE: b'{"step": 1, "loss": 9.0}\n{"st'},
        {METRICS_FILE: b'{"step": 1, "loss": 9.0}\n[]\n{}\n7\n\xff\0\0\n'},
        {METRICS_FILE: b'{"step": 1}\n', ".step-00000001.partial/model.safetensors": b"cut"},
    ],
    ids=["empty directory", "empty metrics", "cut metrics", "damaged metrics", "partial checkpoint"],
)
def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    left: dict[str, bytes], corpus: Corpus, patcher: Patcher, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, steps=2)
    train_model(make_blt(), corpus, None, SHAPE, config, tmp_path / "whole", patcher=patcher)
    run = tmp_path / "stopped"
    run.mkdir()
    for name, contents in left.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(contents)
    train_model(make_blt(), corpus, None, SHAPE, config, run, patcher=patcher, resume=True)
    assert losses(run) == losses(tmp_path / "whole")
    assert sorted(path.name for path in run.iterdir()) == [METRICS_FILE, "step-00000002"]


def test_damaged_metrics_do_not_stop_a_run_with_a_checkpoint(corpus: Corpus, patcher: Patcher, tmp_path: Path) -> None:
    """The process was killed after a checkpoint: the lines after it are written again, damaged ones are dropped."""
    shape = SHAPE
    train_model(make_blt(), corpus, None, shape, CONFIG, tmp_path / "whole", patcher=patcher)
    run, config = tmp_path / "run", dataclasses.replace(CONFIG, checkpoint_every=5)
    train_model(make_blt(), corpus, None, shape, config, run, patcher=patcher)
    (run / "step-00000012").rename(tmp_path / "last")
    with open(run / METRICS_FILE, "ab") as file:
        file.write(b'null\n"x"\n{"step": "7"}\n\0\0\0\n{"step": 13, "lo')
    train_model(make_blt(), corpus, None, shape, config, run, patcher=patcher, resume=True)
    assert losses(run) == losses(tmp_path / "whole")
    (run / METRICS_FILE).unlink()
    (run / "step-00000012").rename(tmp_path / "again")
    train_model(make_blt(), corpus, None, shape, config, run, patcher=patcher, resume=True)
    assert losses(run) == losses(tmp_path / "whole")[10:]


@pytest.mark.parametrize(
    ("config", "field", "values"),
    [
        (OptimConfig, "learning_rate", [0, -1e-3, math.nan, math.inf, "1", True, 10**400]),
        (OptimConfig, "sparse_learning_rate", [0.0, math.nan]),
        (OptimConfig, "min_ratio", [-0.1, 1.5, math.nan]),
        (OptimConfig, "warmup_steps", [-1, 1.5]),
        (OptimConfig, "betas", [(0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), 0.9]),
        (OptimConfig, "eps", [0, math.inf]),
        (OptimConfig, "weight_decay", [-0.1, math.nan]),
        (OptimConfig, "clip_norm", [0, math.nan]),
        (TrainConfig, "steps", [0, -1, 10**8, 1.0]),
        (TrainConfig, "log_every", [0]),
        (TrainConfig, "eval_every", [0]),
        (TrainConfig, "checkpoint_every", [0]),
        (TrainConfig, "seed", [2**63, -(2**63) - 1, 0.5, None]),
        (TrainConfig, "optim", [None, {}]),
        (TrainConfig, "autocast", [1]),
        (TrainConfig, "compile", [None]),
        (TrainConfig, "checkpoint_activations", [0]),
        (TrainConfig, "lanes", [0, -1, 1.0]),
        (RowShape, "row_tokens", [0, 2**31, 1.0]),
        (RowShape, "longest_sequence", [0, 65]),
        (RowShape, "row_patches", [0, 65]),
        (PatcherConfig, "method", ["words"]),
        (PatcherConfig, "rule", ["sum"]),
        (PatcherConfig, "threshold", [None, math.nan, math.inf, "1"]),
        (PatcherConfig, "delta", [0.5]),
        (PatcherConfig, "patch_size", [4]),
        (PatcherConfig, "max_patch_length", [0, 1.5, 2**31]),
    ],
)
def test_every_field_of_a_configuration_is_checked_by_name(config: Any, field: str, values: list[Any]) -> None:
    valid = {
        OptimConfig: {},
        TrainConfig: {"steps": 1},
        RowShape: {"row_tokens": 64, "longest_sequence": 16},
        PatcherConfig: {"threshold": 1.0},
    }[config]
    config(**valid)
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"^{config.__name__}: {field}: expected .*got"):
            config(**valid | {field: value})


def test_options_of_a_method_belong_to_it() -> None:
    PatcherConfig(rule="combined", threshold=1.0, delta=-0.5)
    for options in (
        {"rule": "combined", "threshold": 1.0},
        {"method": "fixed"},
        {"method": "spaces", "threshold": 1.0},
    ):
        with pytest.raises(ValueError, match=r"PatcherConfig: (delta|patch_size|threshold): expected"):
            PatcherConfig(**options)


def test_documents_seen_are_those_of_the_batches(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * (100 + 37 * i))
    corpus, shape = Corpus(tmp_path), RowShape(150, 50)
    batches = shape.batches(DocumentStream(corpus, seed=2))
    read = Counter()
    for _ in range(7):
        read.update(token - 4 for token in next(batches).tokens.ravel().tolist() if token >= 4)
    seen = list(documents_seen(corpus, 2, batches.state_dict()))
    assert Counter(b"".join(seen)) == read and len(seen) > 3


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    for run in (tmp_path / "none" / "below", tmp_path):
        open_run(run, resume=True)
        open_run(run, resume=False)
    (tmp_path / METRICS_FILE).touch()
    open_run(tmp_path, resume=False)  # stopped in its first steps
    (tmp_path / METRICS_FILE).write_text("{}\n")
    with pytest.raises(ValueError, match="there is a run here already"):
        open_run(tmp_path, resume=False)
    for resume in (False, True):
        with pytest.raises(NotADirectoryError, match=METRICS_FILE):
            open_run(tmp_path / METRICS_FILE / "run", resume)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_two_processes_do_not_train_one_run(corpus: Corpus, patcher: Patcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (corpus, None, SHAPE, CONFIG, run)

    def second(metrics: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="run: another process is training this run"):
            train_model(make_blt(), *arguments, patcher=patcher, resume=True)

    train_model(make_blt(), *arguments, patcher=patcher, on_step=second)
    assert [json.loads(line)["step"] for line in (run / METRICS_FILE).open()] == list(range(1, 13))
    train_model(make_blt(), *arguments, patcher=patcher, resume=True)  # it is free again


def test_a_run_that_has_written_nothing_leaves_no_directory(corpus: Corpus, patcher: Patcher, tmp_path: Path) -> None:
    model = make_blt()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        train_model(model, corpus, None, SHAPE, CONFIG, tmp_path / "run", patcher=patcher)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_training(
    corpus: Corpus, patcher: Patcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"safetensors .*pip install 'blt_kernels\[train\]'"):
        train_model(make_blt(), corpus, None, SHAPE, CONFIG, tmp_path / "run", patcher=patcher)
    assert not list(tmp_path.iterdir())


def test_the_metrics_of_a_run_in_the_text_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    runs = {name: tmp_path / "runs" / name for name in ("begun", "trained", "other")}
    for folder in runs.values():
        folder.mkdir(parents=True)
        (folder / METRICS_FILE).write_text('{"text": "no text"}\n')
    (runs["trained"] / "step-00000002").mkdir()
    for run in (runs["begun"], runs["begun"].parent / ".." / "runs" / "begun"):
        found = without_metrics(Corpus(tmp_path), [tmp_path], run)
        assert [file.name for file in found.files] == ["a.txt", f"runs/other/{METRICS_FILE}"]
        assert "2 metrics of a run (runs/begun/metrics.jsonl, runs/trained/metrics.jsonl)" in found.remarks()[0]
    given = runs["trained"] / METRICS_FILE
    assert len(without_metrics(Corpus(given), [given], None).files) == 1


def test_a_loss_that_is_not_finite_stops_training(corpus: Corpus, patcher: Patcher, tmp_path: Path) -> None:
    model = make_blt()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 1: expected a finite loss and gradient norm, got nan"):
        train_model(model, corpus, None, SHAPE, CONFIG, tmp_path / "run", patcher=patcher)


def test_the_end_of_the_corpus_is_said(corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = RowShape(512, 256).batches(DocumentStream(corpus, epochs=1))
    trainer = Trainer(
        EntropyModel(ENTROPY), Lanes([batches]), dataclasses.replace(CONFIG, steps=1000), tmp_path / "run"
    )
    with pytest.raises(ValueError, match=r"the corpus ended at step \d+ of 1000"):
        trainer.train()


@pytest.mark.parametrize("ahead", [False, True])
def test_an_error_in_the_loader_reaches_the_training_loop(ahead: bool, corpus: Corpus) -> None:
    def broken(tokens: np.ndarray) -> np.ndarray:
        raise RuntimeError("broken segmenter")

    batches = PackedBatches(DocumentStream(corpus), 96, 24, segmenter=broken, row_patches=16)
    with (
        contextlib.closing(prefetch(Lanes([batches]), ahead=ahead)) as taken,
        pytest.raises(RuntimeError, match="broken segmenter"),
    ):
        next(taken)


def test_reading_ahead_gives_the_same_batches_and_states(corpus: Corpus, patcher: Patcher) -> None:
    def first(ahead: bool) -> list[tuple[list[int], dict[str, Any]]]:
        batches = SHAPE.batches(DocumentStream(corpus, seed=2), patcher)
        with contextlib.closing(prefetch(Lanes([batches]), ahead=ahead)) as taken:
            return [(batch.tokens.ravel().tolist(), state) for [batch], [state] in itertools.islice(taken, 6)]

    assert first(ahead=True) == first(ahead=False)


def test_a_checkpoint_is_all_that_evaluation_needs(corpus: Corpus, patcher: Patcher, tmp_path: Path) -> None:
    shape = SHAPE
    config = dataclasses.replace(CONFIG, steps=3)
    trainer = train_model(make_blt(), corpus, None, shape, config, tmp_path / "run", patcher=patcher)
    model, loaded, state = load_model(tmp_path / "run")
    assert isinstance(model, BLT) and loaded is not None
    tokens = encode("a = b + 1\nreturn a\n")
    assert loaded(tokens).tolist() == patcher(tokens).tolist()
    expected = bits_per_byte(trainer.model.eval(), held_out_batches(corpus, shape, patcher))
    assert bits_per_byte(model, held_out_batches(corpus, shape, loaded)) == expected
    assert state["bytes_seen"] == trainer.bytes_seen


def test_every_byte_of_the_held_out_text_counts_once(corpus: Corpus, patcher: Patcher) -> None:
    model = make_blt()
    torch.nn.init.zeros_(model.lm_head.weight)  # uniform predictions
    bits, count = bits_per_byte(model, held_out_batches(corpus, SHAPE, patcher))
    assert count == sum(map(len, corpus))
    assert bits == pytest.approx(math.log2(260), rel=1e-6)


def test_training_and_evaluation_count_alike(corpus: Corpus, tmp_path: Path) -> None:
    """The metrics of a step are the bits of the text alone: an end of document counts for nothing."""
    torch.manual_seed(0)
    model = EntropyModel(ENTROPY)
    with torch.no_grad():
        model.lm_head.weight[2] = -10 * torch.ones(32)  # EOS
    shape = RowShape(16384, 2048)
    texts = corpus.with_files(corpus.files[:8])
    expected, _ = bits_per_byte(model, held_out_batches(texts, shape))
    logged = []
    batches = shape.batches(DocumentStream(texts, shuffle=False, epochs=1))
    Trainer(model, Lanes([batches]), TrainConfig(1), tmp_path / "run", on_step=logged.append).train()
    assert logged[0]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert abs(logged[0]["loss"] / math.log(2) - expected) > 0.01


def test_a_loss_that_is_not_finite_is_no_result(corpus: Corpus) -> None:
    model = EntropyModel(ENTROPY)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = math.nan
    with pytest.raises(FloatingPointError, match="expected a finite loss"):
        bits_per_byte(model, held_out_batches(corpus, RowShape(128, 64)))


def test_training_rows_are_full(corpus: Corpus, patcher: Patcher) -> None:
    """Bytes and slots are used up together, and no patch is too many."""
    row_tokens = 4096
    shape = RowShape(row_tokens, 256, patches_of_row(row_tokens, corpus, patcher))
    batches = shape.batches(DocumentStream(corpus, seed=1), patcher)
    tokens, slots = [], []
    for batch in itertools.islice(batches, 40):
        layout = layout_of(batch, torch.device("cpu"))
        layout.validate()
        assert layout.capacity == shape.row_patches and int(layout.overflow.sum()) == 0
        assert int(layout.num_patches) == batch.num_patches
        tokens.append(batch.num_tokens / row_tokens)
        slots.append(batch.num_patches / layout.capacity)
    assert mean(tokens) > 0.97 and mean(slots) > 0.97


def test_the_mean_patch_is_that_of_the_whole_text(tmp_path: Path) -> None:
    """A few long documents of other density, in the middle of many short ones, count by their length."""
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text("word " * (9000 if i in (20, 21) else 60))
    (tmp_path / "dense.txt").write_text("a b " * 20_000)
    text, patcher = Corpus(tmp_path, max_document_bytes=1 << 14), Patcher(PatcherConfig("spaces"))
    documents = [encode(document) for document in text]
    expected = sum(map(len, documents)) / sum(len(patcher(tokens)) for tokens in documents)
    assert mean_patch_length(text, patcher) == pytest.approx(expected, rel=0.01)
    assert patches_of_row(1000, text, patcher) == pytest.approx(1000 / expected, rel=0.01)


def test_bytes_are_those_of_the_text(corpus: Corpus, patcher: Patcher) -> None:
    """BOS, EOS and padding stand for no byte, whether targets are counted or a tokenizer says what they stand for."""
    for segmenter in (None, patcher):
        shape = SHAPE if segmenter else RowShape(288, 144)
        batches = list(shape.batches(DocumentStream(corpus, epochs=1), segmenter))
        assert all(batch.num_bytes == int((batch.targets >= 4).sum()) for batch in batches)
        assert sum(batch.num_bytes for batch in batches) == sum(map(len, corpus))


def test_the_seconds_of_training_include_the_loader(corpus: Corpus, tmp_path: Path) -> None:
    class Slow(PackedBatches):
        def __next__(self):
            time.sleep(0.05)
            return super().__next__()

    torch.manual_seed(0)
    batches = Slow(DocumentStream(corpus), 64, 32)
    trainer = Trainer(EntropyModel(ENTROPY), Lanes([batches]), dataclasses.replace(CONFIG, steps=4), tmp_path / "run")
    trainer.train()
    assert trainer.seconds > 4 * 0.05


def test_models_and_their_patchers_are_made_on_a_device(corpus: Corpus, patcher: Patcher, tmp_path: Path) -> None:
    """The device "meta" stands for a GPU."""
    train_model(
        make_blt(), corpus, None, SHAPE, dataclasses.replace(CONFIG, steps=1), tmp_path / "run", patcher=patcher
    )
    model, loaded, _ = load_model(tmp_path / "run", "meta")
    assert loaded is not None and loaded.entropy_model is not None
    made = new_blt("tiny", 0, "meta"), new_entropy_model("tiny", 0, torch.device("meta"))
    for module in (model, loaded.entropy_model, *made):
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert Patcher(PatcherConfig("spaces")).to("meta").entropy_model is None  # it cuts where its tokens are
