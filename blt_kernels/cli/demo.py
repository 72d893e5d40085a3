"""`make demo`: from raw text to a trained BLT in a few minutes on a CPU, with honest comparisons beside it."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data import Corpus, DocumentStream
from ..model import BLT, EntropyModel
from ..training.evaluate import bits_per_byte, held_out_batches
from ..training.optim import OptimConfig, Optimizers
from ..training.patcher import Patcher
from ..training.rows import RowShape
from ..training.runs import entropy_patcher, new_blt, new_entropy_model, split, standard_library, train_model
from ..training.step import training_step
from ..training.trainer import METRICS_FILE, TrainConfig, Trainer
from .baselines import NgramModel, compress_bits_per_byte
from .plots import save_loss_curve
from .progress import training_progress
from .show import print_bits, show_patches

PATCH_SIZE = 4.5
SAMPLE = "def forward(self, hidden_states, mask=None):\n    return self.dropout(hidden_states)\n"
# Shares of the time: the rest goes to calibration, evaluation and the baselines.
ENTROPY_SHARE = 0.12
BLT_SHARE = 0.5

ENTROPY_SHAPE = RowShape(batch_size=8, row_tokens=512)
BLT_SHAPE = RowShape(batch_size=8, row_tokens=688, row_patches=128)
ENTROPY_OPTIM = OptimConfig(learning_rate=6e-3, warmup_steps=20)
BLT_OPTIM = OptimConfig(learning_rate=4e-3, sparse_learning_rate=3e-2, warmup_steps=30)


def run_demo(console: Console, run: Path, data: list[Path] | None, minutes: float, seed: int) -> None:
    """Trains both models under `run`, prints held-out bits per byte beside the baselines, and draws the loss curve."""
    begin = time.perf_counter()
    corpus = Corpus(data, max_document_bytes=1 << 16) if data else standard_library()
    train, held_out = split(corpus, None, seed)
    held_out_bytes = sum(map(len, held_out))
    console.print(f"text: {corpus.origin}, {len(train.files)} files to train on, {held_out_bytes:,} bytes held out")

    entropy_model = new_entropy_model("tiny", seed)
    _train(console, "entropy model", entropy_model, train, held_out, ENTROPY_SHAPE, ENTROPY_OPTIM, run / "entropy",
           ENTROPY_SHARE * minutes * 60, seed)  # fmt: skip
    patcher = entropy_patcher(
        entropy_model, train, threshold=None, patch_size=PATCH_SIZE, seed=seed, calibration_bytes=1 << 18
    )
    console.print(f"threshold for {PATCH_SIZE} bytes per patch: {patcher.config.threshold:.4f} nats")

    blt = new_blt("tiny", seed)
    trainer = _train(console, "BLT", blt, train, held_out, BLT_SHAPE, BLT_OPTIM, run / "blt",
                     BLT_SHARE * minutes * 60, seed, patcher)  # fmt: skip

    console.print("evaluating all of the held-out text ...")
    blt.eval()
    bits, count = bits_per_byte(blt, held_out_batches(held_out, BLT_SHAPE, patcher))
    entropy_bits, _ = bits_per_byte(entropy_model, held_out_batches(held_out, ENTROPY_SHAPE))
    seen = list(documents_seen(train, seed, trainer.batches.state_dict()))
    rows = {"BLT": bits, "entropy model": entropy_bits}
    rows["order-3 n-gram, same training bytes"] = NgramModel(3).fit(seen).bits_per_byte(held_out)
    rows |= compress_bits_per_byte(held_out, dictionary=seen)

    show_patches(console, patcher, SAMPLE.encode(), html=run / "patches.html", png=run / "patches.png")
    save_loss_curve(run / "loss.png", run / "blt" / METRICS_FILE, baselines=rows)
    print_bits(console, f"bits per byte on {count:,} held-out bytes", rows)
    seconds = time.perf_counter() - begin
    result = {"bits_per_byte": rows, "held_out_bytes": count, "trained_bytes": trainer.bytes_seen, "seconds": seconds}
    (run / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"{seconds:.0f} s in all; loss curve, patches and figures in {run}/")


def documents_seen(train: Corpus, seed: int, state: dict[str, Any]) -> Iterator[bytes]:
    """What a run has read of each document, given the state of its loader."""
    opened = {json.dumps(document["documents"]): document["offset"] for document in state["open"] if document}
    stream = DocumentStream(train, seed=seed)
    while (position := stream.state_dict()) != state["documents"]:
        document = next(stream)
        tokens = opened.get(json.dumps(position), len(document) + 1)
        yield document[: max(0, tokens - 1)]  # less BOS


def _train(
    console: Console,
    name: str,
    model: EntropyModel | BLT,
    train: Corpus,
    held_out: Corpus,
    shape: RowShape,
    optim: OptimConfig,
    run: Path,
    seconds: float,
    seed: int,
    patcher: Patcher | None = None,
) -> Trainer:
    autocast, step_seconds = _measure(model, train, shape, optim, patcher)
    steps = max(20, int(seconds / step_seconds))
    config = TrainConfig(
        steps, optim, autocast, log_every=5, eval_every=max(1, steps // 10), checkpoint_every=steps, seed=seed
    )
    with training_progress(console, name, steps) as on_step:
        return train_model(model, train, held_out, shape, config, run, patcher=patcher, on_step=on_step)


def _measure(
    model: EntropyModel | BLT, train: Corpus, shape: RowShape, optim: OptimConfig, patcher: Patcher | None
) -> tuple[bool, float]:
    """Whether bfloat16 autocast pays on this machine, and the median seconds of a step, its batch included.

    Measured on a copy of the model. bfloat16 products are about three times as fast where the processor has them, and
    slower where it does not.
    """
    copied = copy.deepcopy(model)
    optimizers = Optimizers(copied, optim, 100)
    batches = shape.batches(DocumentStream(train, seed=1), patcher)
    times: dict[bool, list[float]] = {False: [], True: []}
    for step in range(14):
        autocast = step % 2 == 1
        begin = time.perf_counter()
        training_step(copied, next(batches), optimizers, autocast=autocast)
        times[autocast].append(time.perf_counter() - begin)
    medians = {autocast: statistics.median(seconds[2:]) for autocast, seconds in times.items()}
    best = min(medians, key=lambda autocast: medians[autocast])
    return best, medians[best]
