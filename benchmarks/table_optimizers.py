"""`python -m benchmarks tables`: what a BLT learns with each optimiser of its hash tables.

Trains the demo's BLT on the standard library, on patches of one entropy model and with everything but the tables'
optimiser as in the demo, and measures bits per byte on the same held-out text. Both optimisers get the same grid of
learning rates with the first seed, and the other seeds at the rate that was best for them. The result is written after
every run; the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from blt_kernels.cli.demo import ENTROPY, MAIN, PATCH_SIZE
from blt_kernels.data import Batch, Corpus, DocumentStream
from blt_kernels.model import BLT, EntropyModel
from blt_kernels.training.calibration import entropy_patcher
from blt_kernels.training.evaluate import bits_per_byte, held_out_batches
from blt_kernels.training.optim import TABLE_OPTIMIZERS, OptimConfig, Optimizers
from blt_kernels.training.rows import patches_of_row
from blt_kernels.training.runs import DOCUMENT_BYTES, entropy_order, new_blt, new_entropy_model, split, standard_library
from blt_kernels.training.step import training_step

from .flop_matched.texts import text_name
from .machine import describe_machine, device_slug, measured_on
from .report.table import Table
from .store import write_json

RATES = (0.01, 0.03, 0.1, 0.3)
SEEDS = (0, 1, 2)
FILE = "table_optimizers.json"  # in the folder of a device
HELD_OUT_BYTES = 1 << 17

Run = tuple[str, float, int]  # optimiser, learning rate, seed


@dataclasses.dataclass(frozen=True)
class Settings:
    """What runs of one result have in common: steps of a BLT and of the entropy model, and bfloat16 autocast."""

    steps: int
    entropy_steps: int
    autocast: bool


USUAL = Settings(steps=150, entropy_steps=150, autocast=True)


class Texts:
    """Batches for every seed, all cut by one patcher, and the held-out ones."""

    def __init__(self, corpus: Corpus, settings: Settings):
        self._train, calibration, held_out = split(corpus, None, SEEDS[0])
        self._settings = settings
        model = new_entropy_model("tiny", SEEDS[0])
        rows = islice(
            ENTROPY.shape.batches(DocumentStream(self._train, seed=entropy_order(SEEDS[0]))), settings.entropy_steps
        )
        fit(model, list(rows), ENTROPY.optim, settings.autocast)
        self._patcher = entropy_patcher(model, calibration, threshold=None, patch_size=PATCH_SIZE, num_bytes=1 << 18)
        patches = patches_of_row(MAIN.shape.row_tokens, self._train, self._patcher)
        self._shape = dataclasses.replace(MAIN.shape, row_patches=patches)
        self.held_out = list(held_out_batches(held_out, self._shape, self._patcher, max_bytes=HELD_OUT_BYTES))

    @functools.lru_cache(maxsize=len(SEEDS))  # noqa: B019  (there is one of these, and it lives as long as the program)
    def batches(self, seed: int) -> list[Batch]:
        """What a run with this seed reads."""
        documents = DocumentStream(self._train, seed=seed)
        return list(islice(self._shape.batches(documents, self._patcher), self._settings.steps))


def fit(model: BLT | EntropyModel, batches: list[Batch], config: OptimConfig, autocast: bool) -> None:
    """Trains for one step on each batch, and leaves the model in eval mode."""
    optimizers = Optimizers(model, config, len(batches))
    model.train()
    for batch in batches:
        training_step(model, [batch], optimizers, autocast=autocast)
    model.eval()


def train(run: Run, texts: Texts, settings: Settings) -> dict[str, Any]:
    """Trains and evaluates one BLT; its part of the result."""
    optimizer, rate, seed = run
    config = dataclasses.replace(MAIN.optim, table_optimizer=optimizer, sparse_learning_rate=rate)
    model, batches = new_blt("tiny", seed), texts.batches(seed)
    begin = time.perf_counter()
    fit(model, batches, config, settings.autocast)
    seconds = time.perf_counter() - begin
    bits, count = bits_per_byte(model, texts.held_out)
    return {
        "optimizer": optimizer,
        "rate": rate,
        "seed": seed,
        "bits_per_byte": bits,
        "held_out_bytes": count,
        "trained_bytes": sum(batch.num_bytes for batch in batches),
        "seconds": seconds,
    }


def next_run(runs: list[dict[str, Any]]) -> Run | None:
    """The first run that is missing: of the grid with the first seed, then of other seeds at the best rates."""
    done = {(run["optimizer"], run["rate"], run["seed"]) for run in runs}
    wanted: list[Run] = [(name, rate, SEEDS[0]) for name in TABLE_OPTIMIZERS for rate in RATES]
    if done.issuperset(wanted):
        wanted = [(name, best_rate(runs, name), seed) for name in TABLE_OPTIMIZERS for seed in SEEDS[1:]]
    return next((run for run in wanted if run not in done), None)


def best_rate(runs: list[dict[str, Any]], optimizer: str) -> float:
    """The rate of the grid with which the first seed has the fewest bits per byte."""
    grid = [run for run in runs if run["optimizer"] == optimizer and run["seed"] == SEEDS[0]]
    return float(min(grid, key=lambda run: run["bits_per_byte"])["rate"])


def read(path: Path) -> dict[str, Any] | None:
    """A result of this benchmark; None where there is none yet.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        for run in result["runs"]:
            _ = {name: run[name] for name in ("optimizer", "rate", "seed", "bits_per_byte", "seconds")}
        _ = result["settings"]["steps"], result["text"], result["finished"]
        _ = {name: result["machine"][name] for name in ("device", "torch", "commit", "date")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a readable result of the optimisers of tables: {error!r}") from error
    return result


def table(result: dict[str, Any]) -> Table:
    """A line for each optimiser: the grid with the first seed, and all seeds at the best rate."""
    runs, lines = result["runs"], []
    for name in TABLE_OPTIMIZERS:
        mine = [run for run in runs if run["optimizer"] == name]
        grid = {run["rate"]: run["bits_per_byte"] for run in mine if run["seed"] == SEEDS[0]}
        if not grid:
            continue
        best = best_rate(runs, name)
        bits = [run["bits_per_byte"] for run in mine if run["rate"] == best]
        mean = f"{statistics.mean(bits):.3f} ({min(bits):.3f} .. {max(bits):.3f}), {len(bits)} seeds at {best:g}"
        lines.append((name, *(f"{grid[rate]:.3f}" if rate in grid else "" for rate in RATES), mean))
    title = (
        f"Bits per byte on held-out text after {result['settings']['steps']} steps of the demo's BLT, by learning rate "
        "of the tables, and over seeds at the best rate"
    )
    return Table(title, ("optimiser", *(f"{rate:g}" for rate in RATES), "mean and range"), lines)


def seed_by_seed(result: dict[str, Any]) -> str:
    """How the optimisers differ at their best rates, a sentence: seeds differ by more than optimisers do."""
    runs = result["runs"]
    ours, adam = (
        {run["seed"]: run["bits_per_byte"] for run in runs if (run["optimizer"], run["rate"]) == (name, best)}
        for name, best in ((name, best_rate(runs, name)) for name in ("rowwise_adagrad", "sparse_adam"))
    )
    gains = ", ".join(f"{adam[seed] - ours[seed]:+.3f}" for seed in sorted(adam.keys() & ours.keys()))
    return f"Bits per byte that sparse_adam has more than rowwise_adagrad seed by seed, at their best rates: {gains}."


def markdown(result: dict[str, Any]) -> list[str]:
    """The result for docs/results.md."""
    shown, machine = table(result), result["machine"]
    title = f"{shown.title} ({measured_on(machine)}; text: {result['text']}):"
    return [title, shown.markdown(), seed_by_seed(result) if result["finished"] else "**Not finished.**"]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tables", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="text; default: Python's standard library")
    parser.add_argument("--steps", type=int, default=USUAL.steps, help=f"of a run (default: {USUAL.steps})")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help=f"folder of <device>/{FILE}")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    settings = dataclasses.replace(USUAL, steps=options.steps)
    corpus = standard_library() if options.data is None else Corpus(options.data, max_document_bytes=DOCUMENT_BYTES)
    machine = describe_machine(torch.device("cpu"))
    path = options.out / device_slug(machine["device"]) / FILE
    facts = {"settings": dataclasses.asdict(settings), "text": text_name(options.data)}
    result = read(path) or {**facts, "machine": machine, "finished": False, "runs": []}
    if {name: result[name] for name in facts} != facts:
        raise ValueError(f"{path}: the result of other settings is here already; delete it, or choose another --out")
    texts = None
    while (run := next_run(result["runs"])) is not None:
        texts = texts or Texts(corpus, settings)
        result["runs"].append(train(run, texts, settings))
        result["finished"] = next_run(result["runs"]) is None
        write_json(path, result)
        print(f"{run}: {result['runs'][-1]['bits_per_byte']:.3f} bits per byte", flush=True)
    table(result).show()
    print(seed_by_seed(result))
    print(path)
