"""`make demo`: from raw text to a trained BLT in a few minutes on a CPU, with honest comparisons beside it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .._files import atomic_path
from .._optional import optional
from ..data import Address, Corpus, DocumentStream
from ..model import BLT, EntropyModel
from ..training.calibration import entropy_patcher
from ..training.checkpoint import latest_checkpoint, list_checkpoints, load_state
from ..training.evaluate import bits_per_byte, held_out_batches
from ..training.optim import OptimConfig, Optimizers
from ..training.patcher import Patcher
from ..training.rows import RowShape, patches_of_row
from ..training.runs import (
    DOCUMENT_BYTES,
    new_blt,
    new_entropy_model,
    open_run,
    split,
    standard_library,
    train_model,
    without_metrics,
)
from ..training.step import training_step
from ..training.trainer import METRICS_FILE, TrainConfig, Trainer
from .baselines import compress_bits_per_byte
from .console import say
from .generate import write_sample
from .plots import save_loss_curve
from .progress import training_progress
from .show import print_bits, report_left_out, report_skipped, show_patches

PATCH_SIZE = 4.5
SAMPLE = "def forward(self, hidden_states, mask=None):\n    return self.dropout(hidden_states)\n"
PROMPT = b"def read_file(path):\n"
SAMPLING: dict[str, Any] = {"max_new_bytes": 400, "temperature": 0.7, "min_p": 0.05}
RESULT_FILE = "result.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of the two models that the demo trains.

    Attributes:
        name: for the progress bar.
        folder: of its run, within that of the demo.
        share: of the demo's time. What is left goes to calibration, evaluation and the baselines.
        shape, optim: how it is trained; the patches of a row are measured on the text.
    """

    name: str
    folder: str
    share: float
    shape: RowShape
    optim: OptimConfig


ENTROPY = Stage(
    "entropy model",
    "entropy",
    0.12,
    RowShape(4096, 512),
    OptimConfig(learning_rate=6e-3, sparse_learning_rate=3e-2, warmup_steps=20, table_optimizer="rowwise_adagrad"),
)
MAIN = Stage(
    "BLT",
    "blt",
    0.5,
    RowShape(4608, 576),
    OptimConfig(learning_rate=4e-3, sparse_learning_rate=3e-2, warmup_steps=30),
)


def run_demo(
    console: Console, run: Path, data: list[Path] | None, minutes: float, seed: int, device: torch.device
) -> None:
    """Trains both models under `run` on `device`, prints held-out bits per byte beside the baselines, and draws the
    loss curve.

    A demo that was interrupted goes on with the model that it was training.

    Raises:
        ValueError: `run` holds the results of a demo, or models of something else.
    """
    begin = time.perf_counter()
    optional("matplotlib")  # if it is missing, that is said now and not when both models are trained
    if (run / RESULT_FILE).exists():
        raise ValueError(f"{run}: the results of a demo are here already; remove them, or choose another --run")
    open_run(run, resume=True)
    corpus = Corpus(data, max_document_bytes=DOCUMENT_BYTES) if data else standard_library()
    corpus = without_metrics(corpus, data or [], run)
    if data:  # what is left out of the standard library is the demo's own choice
        report_left_out(corpus)
    train, calibration, held_out = split(corpus, None, seed)
    held_out_bytes = sum(map(len, held_out))
    say(console, f"text: {corpus.origin}, {len(train.files)} files to train on, {held_out_bytes:,} bytes held out")

    texts = train, held_out
    settings = {"minutes": minutes, "seed": seed}
    entropy_model = new_entropy_model("ngram", seed, device)
    _train(console, ENTROPY, entropy_model, texts, run, settings)
    patcher = entropy_patcher(entropy_model, calibration, threshold=None, patch_size=PATCH_SIZE)
    say(console, f"threshold for {PATCH_SIZE} bytes per patch: {patcher.config.threshold:.4f} nats")

    blt = new_blt("tiny", seed, device)
    shape = dataclasses.replace(MAIN.shape, row_patches=patches_of_row(MAIN.shape.row_tokens, train, patcher))
    stage = dataclasses.replace(MAIN, shape=shape)
    trainer = _train(console, stage, blt, texts, run, settings, patcher)

    say(console, "evaluating all of the held-out text ...")
    blt.eval()
    bits, count = bits_per_byte(blt, held_out_batches(held_out, shape, patcher))
    entropy_bits, _ = bits_per_byte(entropy_model, held_out_batches(held_out, ENTROPY.shape))
    seen = documents_seen(train, seed, trainer.lanes.loaders[0].state_dict())
    rows = {"BLT": bits, "entropy model": entropy_bits} | compress_bits_per_byte(held_out, dictionary=seen)

    show_patches(console, patcher, SAMPLE.encode(), html=run / "patches.html", png=run / "patches.png")
    with atomic_path(run / "loss.png") as partial:
        save_loss_curve(partial, run / MAIN.folder / METRICS_FILE, baselines=rows)
    print_bits(console, f"bits per byte on {count:,} held-out bytes", rows)
    report_skipped(train, held_out)
    say(console, "a text that the BLT writes:")
    sample = write_sample(console, blt, patcher, PROMPT, at_once=True, seed=abs(seed), **SAMPLING)
    trained = shape.row_tokens / (shape.row_patches or shape.row_tokens)
    say(console, f"{sample.summary()} ({trained:.2f} in the text that it was trained on)")
    seconds = time.perf_counter() - begin
    result = {
        "bits_per_byte": rows,
        "held_out_bytes": count,
        "trained_bytes": trainer.bytes_seen,
        "sample": dataclasses.asdict(sample),
        "seconds": seconds,
    }
    with atomic_path(run / RESULT_FILE) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    say(console, f"{seconds:.0f} s in all; loss curve, patches and figures in {run}/")


def documents_seen(train: Corpus, seed: int, state: dict[str, Any]) -> Iterator[bytes]:
    """What a run has read of each document, given the state of its loader."""
    opened = {(document["epoch"], Address(*document["address"])): document["offset"] for document in state["open"]}
    stream = DocumentStream(train, seed=seed)
    while stream.state_dict() != state["documents"]:
        document = next(stream)
        tokens = opened.get((stream.epoch, stream.address), len(document) + 1)
        yield document[: max(0, tokens - 1)]  # less BOS


def _train(
    console: Console,
    stage: Stage,
    model: EntropyModel | BLT,
    texts: tuple[Corpus, Corpus],
    demo: Path,
    settings: dict[str, Any],
    patcher: Patcher | None = None,
) -> Trainer:
    """Trains the model of a stage for its share of the time, or loads the one that an earlier demo has trained."""
    train, held_out = texts
    run = demo / stage.folder
    if list_checkpoints(run):
        config = _config_of(run, settings)
    else:
        autocast, step_seconds = _measure(model, train, stage, patcher)
        steps = max(20, int(stage.share * settings["minutes"] * 60 / step_seconds))
        config = TrainConfig(
            steps, stage.optim, autocast, log_every=5, eval_every=max(1, steps // 10), checkpoint_every=steps,
            seed=settings["seed"],
        )  # fmt: skip
    with training_progress(console, stage.name, config.steps) as on_step:
        return train_model(
            model,
            train,
            held_out,
            stage.shape,
            config,
            run,
            patcher=patcher,
            resume=True,
            on_step=on_step,
            notes={"command": "demo", "demo": settings},
        )


def _config_of(run: Path, settings: dict[str, Any]) -> TrainConfig:
    """How an earlier demo with the same settings has trained the model in `run`."""
    state = load_state(latest_checkpoint(run))
    notes = state.get("notes")
    saved = notes.get("demo") if isinstance(notes, dict) else None
    if saved != settings:
        of = "something else" if saved is None else "a demo with " + _words(saved)
        raise ValueError(f"{run}: the model of {of} is here already, got {_words(settings)}; choose another --run")
    return TrainConfig(**state["train"] | {"optim": OptimConfig(**state["train"]["optim"])})


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"--{name} {value}" for name, value in settings.items())


def _measure(model: EntropyModel | BLT, train: Corpus, stage: Stage, patcher: Patcher | None) -> tuple[bool, float]:
    """Whether bfloat16 autocast pays on this machine, and the median seconds of a step, its batch included.

    Measured on a copy of the model. bfloat16 products are about three times as fast where the processor has them, and
    slower where it does not. Batches are timed with one open document: the first ones of the run cost more, because
    all that it opens is cut into patches then.
    """
    begin = time.perf_counter()
    loader = stage.shape.batches(DocumentStream(train, seed=1), patcher, open_documents=1)
    batches = list(itertools.islice(loader, 14))
    batch_seconds = (time.perf_counter() - begin) / len(batches)
    copied = copy.deepcopy(model)
    optimizers = Optimizers(copied, stage.optim, 100)
    times: dict[bool, list[float]] = {False: [], True: []}
    for step, batch in enumerate(batches):
        autocast = step % 2 == 1
        begin = time.perf_counter()
        _, norm = training_step(copied, [batch], optimizers, autocast=autocast)
        norm.item()  # waits for the device
        times[autocast].append(time.perf_counter() - begin)
    medians = {autocast: statistics.median(seconds[2:]) for autocast, seconds in times.items()}
    best = min(medians, key=lambda autocast: medians[autocast])
    return best, medians[best] + batch_seconds
