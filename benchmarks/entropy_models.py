"""`python -m benchmarks entropy_models`: what tables of n-grams do for an entropy model, and for a BLT on its patches.

Trains entropy models on Python's standard library for equally many seconds: the preset `tiny`, and tables of n-grams
under no layer (the preset `ngram`), one, and two. Then, for each seed, the demo's BLT on the patches of `tiny` and on
those of `ngram`, for equally many seconds, cutting included. Seconds are those of the processor, so that other programs
on the machine count for little; set OMP_NUM_THREADS=1. The JSON is written after every run.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from blt_kernels.cli.demo import ENTROPY, MAIN, PATCH_SIZE
from blt_kernels.data import Corpus, DocumentStream
from blt_kernels.model import BLT, EntropyModel, EntropyModelConfig
from blt_kernels.model.flops import entropy_model_flops
from blt_kernels.training.calibration import entropy_patcher
from blt_kernels.training.evaluate import bits_per_byte, held_out_batches
from blt_kernels.training.optim import OptimConfig, Optimizers
from blt_kernels.training.patcher import Patcher
from blt_kernels.training.rows import RowShape, mean_patch_length
from blt_kernels.training.runs import DOCUMENT_BYTES, entropy_order, new_blt, seeded, split, standard_library
from blt_kernels.training.step import training_step

from .flop_matched.texts import text_name
from .machine import describe_machine, device_slug, measured_on
from .report.table import Table
from .store import write_json

FILE = "entropy_models.json"  # in the folder of a device
SEEDS = (0, 1, 2)  # of the BLTs; entropy models and the division of the text have the first
TINY, NGRAM = (EntropyModelConfig.preset(name) for name in ("tiny", "ngram"))
MODELS = {"tiny": TINY, "ngram": NGRAM} | {
    f"tables and {layers} of tiny's layers": dataclasses.replace(
        NGRAM, transformer=dataclasses.replace(TINY.transformer, num_layers=layers)
    )
    for layers in (1, 2)
}
CUTTERS = ("tiny", "ngram")  # whose patches BLTs are trained on
SAMPLED_BYTES = 1 << 18  # of held-out text and of calibration text
TRIAL_BATCHES = 8
FEWEST_STEPS = 20


def seconds_of(call: Callable[[], Any]) -> float:
    """Of the processor."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def train(
    model: EntropyModel | BLT,
    text: Corpus,
    shape: RowShape,
    optim: OptimConfig,
    seconds: float,
    seed: int,
    patcher: Patcher | None = None,
) -> dict[str, Any]:
    """Trains for about `seconds` in bfloat16 autocast. Cutting is measured before, and a step on a copy of the model.

    What the loader cuts before its first batch is not counted: in longer runs it is little.
    """
    sample = shape.batches(DocumentStream(text, seed=seed + 1000), patcher, open_documents=1)
    batches: list[Any] = []
    batch_seconds = seconds_of(lambda: batches.extend(islice(sample, TRIAL_BATCHES))) / TRIAL_BATCHES
    copied = copy.deepcopy(model)
    trial = Optimizers(copied, optim, TRIAL_BATCHES)
    times = sorted(seconds_of(lambda b=batch: training_step(copied, [b], trial, autocast=True)) for batch in batches)
    steps = max(FEWEST_STEPS, int(seconds / (times[TRIAL_BATCHES // 2] + batch_seconds)))

    optimizers = Optimizers(model, optim, steps)
    order = entropy_order(seed) if patcher is None else seed
    loader = shape.batches(DocumentStream(text, seed=order), patcher)
    num_bytes, begin = 0, 0.0
    model.train()
    for batch in islice(loader, steps):
        begin = begin or time.process_time()
        training_step(model, [batch], optimizers, autocast=True)
        num_bytes += batch.num_bytes
    model.eval()
    return {"steps": steps, "trained_bytes": num_bytes, "seconds": time.process_time() - begin}


def run_entropy_model(
    config: EntropyModelConfig, texts: tuple[Corpus, Corpus, Corpus], seconds: float
) -> tuple[Patcher, dict[str, Any]]:
    """Trains and evaluates an entropy model: the calibrated patcher, and its part of the result."""
    text, calibration, held_out = texts
    with seeded(SEEDS[0]):
        model = EntropyModel(config)
    result = train(model, text, ENTROPY.shape, ENTROPY.optim, seconds, SEEDS[0])
    bits, count = bits_per_byte(model, held_out_batches(held_out, ENTROPY.shape, max_bytes=SAMPLED_BYTES))
    patcher = entropy_patcher(model, calibration, threshold=None, patch_size=PATCH_SIZE, num_bytes=SAMPLED_BYTES)
    tokens = torch.randint(4, config.vocab_size, (1, 1 << 15))
    model.entropies(tokens)
    return patcher, result | {
        "bits_per_byte": bits,
        "held_out_bytes": count,
        "patch_size": {"training": mean_patch_length(text, patcher), "held out": mean_patch_length(held_out, patcher)},
        "cut_bytes_per_second": tokens.numel() / seconds_of(lambda: model.entropies(tokens)),
        "flops_per_byte": entropy_model_flops(config, context_bytes=ENTROPY.shape.longest_sequence).forward,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def run_blt(
    patcher: Patcher, patch_size: float, texts: tuple[Corpus, Corpus, Corpus], seed: int, seconds: float
) -> dict[str, Any]:
    """Trains the demo's BLT on these patches, of `patch_size` bytes in the training text, and evaluates it."""
    text, _, held_out = texts
    model = new_blt("tiny", seed)
    shape = dataclasses.replace(MAIN.shape, row_patches=round(MAIN.shape.row_tokens / patch_size))
    result = train(model, text, shape, MAIN.optim, seconds, seed, patcher)
    bits, count = bits_per_byte(model, held_out_batches(held_out, shape, patcher, max_bytes=SAMPLED_BYTES))
    return result | {"bits_per_byte": bits, "held_out_bytes": count}


def read(path: Path) -> dict[str, Any] | None:
    """A result of this benchmark; None where there is none.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        markdown(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable result of entropy models: {error!r}") from error
    return result


def markdown(result: dict[str, Any]) -> list[str]:
    """The result for docs/results.md: a table of the entropy models, and one of the BLTs on their patches."""
    runs, settings, machine = result["runs"], result["settings"], result["machine"]
    models = [
        (
            name,
            f"{run['bits_per_byte']:.3f}",
            f"{run['steps']}",
            f"{run['flops_per_byte'] / 1e3:.0f}",
            f"{run['cut_bytes_per_second'] / 1e3:.0f}",
            f"{run['patch_size']['training']:.2f}, {run['patch_size']['held out']:.2f}",
        )
        for name, run in runs.items()
        if "patch_size" in run
    ]
    columns = ("entropy model", "bits per byte", "steps", "kFLOP a byte", "kB/s", "patches of 4.5: training, held out")
    title = (
        f"Entropy models after {settings['seconds']:g} s of training ({measured_on(machine)}; text: {result['text']})"
    )
    blts = []
    for name in CUTTERS:
        mine = [run for key, run in runs.items() if key.startswith(_blt_name(name, ""))]
        if mine:
            bits, steps = ([run[key] for run in mine] for key in ("bits_per_byte", "steps"))
            shown = f"{statistics.mean(bits):.3f} ({min(bits):.3f} .. {max(bits):.3f})"
            blts.append((name, shown, f"{len(mine)}", f"{statistics.mean(steps):.0f}"))
    below = f"The demo's BLT on their patches, after {settings['blt_seconds']:g} s of training, cutting included"
    tables = (
        Table(title, columns, models),
        Table(below, ("patches of", "bits per byte: mean and range", "seeds", "steps"), blts),
    )
    return [part for table in tables for part in (f"{table.title}:", table.markdown())]


def _blt_name(cutter: str, seed: int | str) -> str:
    return f"BLT on patches of {cutter}, seed {seed}"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks entropy_models", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="text; default: Python's standard library")
    parser.add_argument("--seconds", type=float, default=12.0, help="of training an entropy model (default: 12)")
    parser.add_argument("--blt-seconds", type=float, default=108.0, help="of training a BLT (default: the demo's 108)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help=f"folder of <device>/{FILE}")
    options = parser.parse_args(arguments)
    for name in ("seconds", "blt_seconds"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: expected a number above 0, got {getattr(options, name)}")
    corpus = standard_library() if options.data is None else Corpus(options.data, max_document_bytes=DOCUMENT_BYTES)
    texts = split(corpus, None, SEEDS[0])
    machine = describe_machine(torch.device("cpu"))
    path = options.out / device_slug(machine["device"]) / FILE
    runs: dict[str, dict[str, Any]] = {}
    result = {
        "text": text_name(options.data),
        "settings": {"seconds": options.seconds, "blt_seconds": options.blt_seconds},
    }

    def keep(name: str, run: dict[str, Any]) -> None:
        runs[name] = run
        write_json(path, {**result, "machine": machine, "runs": runs})
        print(f"{name}: {run['bits_per_byte']:.3f} bits per byte, {run['steps']} steps", flush=True)

    patchers = {}
    for name, config in MODELS.items():
        patchers[name], run = run_entropy_model(config, texts, options.seconds)
        keep(name, run)
    for seed in SEEDS:
        for name in CUTTERS:
            patch_size = runs[name]["patch_size"]["training"]
            run = run_blt(patchers[name], patch_size, texts, seed, options.blt_seconds)
            keep(_blt_name(name, seed), run)
    print(path)
