"""`python -m benchmarks entropy_models`: what tables of n-grams do for an entropy model, and for the BLT on its patches.

Trains entropy models on Python's standard library for equally many seconds: the preset `tiny`, and n-gram tables under
no, one and two of its layers. Then, for each seed, the demo's BLT on the patches of `tiny` and of the preset `ngram`,
each with the demo's seconds for both models, cutting included. Seconds are those of the processor, so that other
programs on the machine count for little; use one thread. The JSON is written after every run, and the same command goes
on after an interruption.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from blt_kernels.cli.demo import ENTROPY, MAIN, PATCH_SIZE
from blt_kernels.data import OPEN_DOCUMENTS, Corpus, DocumentStream
from blt_kernels.model import BLT, EntropyModel, EntropyModelConfig
from blt_kernels.model.flops import entropy_model_flops
from blt_kernels.training.calibration import entropy_patcher
from blt_kernels.training.evaluate import bits_per_byte, held_out_batches
from blt_kernels.training.optim import OptimConfig, Optimizers
from blt_kernels.training.patcher import Patcher
from blt_kernels.training.rows import RowShape, mean_patch_length, patches_of_row
from blt_kernels.training.runs import DOCUMENT_BYTES, new_blt, seeded, split, standard_library
from blt_kernels.training.step import training_step

from .machine import describe_machine, device_slug
from .store import write_json

FILE = "entropy_models.json"  # in the folder of a device
SEEDS = (0, 1, 2)
TINY, NGRAM = (EntropyModelConfig.preset(name) for name in ("tiny", "ngram"))
MODELS = {"tiny": TINY, "ngram": NGRAM} | {
    f"{layers} layers and tables": dataclasses.replace(
        NGRAM, transformer=dataclasses.replace(TINY.transformer, num_layers=layers)
    )
    for layers in (1, 2)
}
OPTIM = dataclasses.replace(ENTROPY.optim, table_optimizer="rowwise_adagrad", sparse_learning_rate=3e-2)
HELD_OUT_BYTES = 1 << 19
DEMO_SECONDS = 3.6 * 60


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
    """Trains for about `seconds`, in bfloat16 autocast: cutting is measured first, and a step on a copy of the model."""
    sample = shape.batches(DocumentStream(text, seed=seed + 1000), patcher, open_documents=1)
    batches: list[Any] = []
    batch_seconds = seconds_of(lambda: batches.extend(islice(sample, 8))) / 8
    copied = copy.deepcopy(model)
    trial = Optimizers(copied, optim, 100)
    times = sorted(seconds_of(lambda b=batch: training_step(copied, [b], trial, autocast=True)) for batch in batches)
    opened = 0.0 if patcher is None else batch_seconds * OPEN_DOCUMENTS * DOCUMENT_BYTES / shape.row_tokens
    steps = max(20, int((seconds - opened) / (times[len(times) // 2] + batch_seconds)))

    optimizers, loader, num_bytes = (
        Optimizers(model, optim, steps),
        shape.batches(DocumentStream(text, seed=seed), patcher),
        0,
    )

    def run() -> None:
        nonlocal num_bytes
        for batch in islice(loader, steps):
            training_step(model, [batch], optimizers, autocast=True)
            num_bytes += batch.num_bytes

    model.train()
    spent = seconds_of(run)
    model.eval()
    return {"steps": steps, "trained_bytes": num_bytes, "seconds": spent}


def make_entropy_model(config: EntropyModelConfig, seed: int) -> EntropyModel:
    with seeded(seed):
        return EntropyModel(config)


def run_entropy_model(name: str, texts: tuple[Corpus, Corpus, Corpus], seconds: float) -> dict[str, Any]:
    """Trains and evaluates one of MODELS."""
    text, calibration, held_out = texts
    model = make_entropy_model(MODELS[name], SEEDS[0])
    trained = train(model, text, ENTROPY.shape, OPTIM, seconds, SEEDS[0])
    bits, count = bits_per_byte(model, held_out_batches(held_out, ENTROPY.shape, max_bytes=HELD_OUT_BYTES))
    patcher = entropy_patcher(model, calibration, threshold=None, patch_size=PATCH_SIZE)
    tokens = torch.randint(4, MODELS[name].vocab_size, (1, 1 << 15))
    model.entropies(tokens)
    context = ENTROPY.shape.longest_sequence
    return trained | {
        "bits_per_byte": bits,
        "held_out_bytes": count,
        "patch_size": {"training": mean_patch_length(text, patcher), "held out": mean_patch_length(held_out, patcher)},
        "cut_bytes_per_second": tokens.numel() / seconds_of(lambda: model.entropies(tokens)),
        "flops_per_byte": entropy_model_flops(MODELS[name], context_bytes=context).forward,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def run_blt(name: str, texts: tuple[Corpus, Corpus, Corpus], seed: int, seconds: float) -> dict[str, Any]:
    """Trains an entropy model and the demo's BLT on its patches, and evaluates the BLT."""
    text, calibration, held_out = texts
    model = make_entropy_model(MODELS[name], seed)
    train(model, text, ENTROPY.shape, OPTIM, ENTROPY.share * seconds, seed)
    patcher = entropy_patcher(model, calibration, threshold=None, patch_size=PATCH_SIZE, num_bytes=1 << 18)
    blt = new_blt("tiny", seed)
    shape = dataclasses.replace(MAIN.shape, row_patches=patches_of_row(MAIN.shape.row_tokens, text, patcher))
    trained = train(blt, text, shape, MAIN.optim, MAIN.share * seconds, seed, patcher)
    bits, count = bits_per_byte(blt, held_out_batches(held_out, shape, patcher, max_bytes=HELD_OUT_BYTES))
    return trained | {
        "bits_per_byte": bits,
        "held_out_bytes": count,
        "patch_size": {"training": mean_patch_length(text, patcher), "held out": mean_patch_length(held_out, patcher)},
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks entropy_models", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="text; default: Python's standard library")
    parser.add_argument("--seconds", type=float, default=12.0, help="of training an entropy model (default: 12)")
    parser.add_argument("--demo-seconds", type=float, default=DEMO_SECONDS, help=f"default: {DEMO_SECONDS:g}")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help=f"folder of <device>/{FILE}")
    options = parser.parse_args(arguments)
    for name in ("seconds", "demo_seconds"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: expected a number above 0, got {getattr(options, name)}")
    corpus = standard_library() if options.data is None else Corpus(options.data, max_document_bytes=DOCUMENT_BYTES)
    texts = split(corpus, None, SEEDS[0])
    machine = describe_machine(torch.device("cpu"))
    path = options.out / device_slug(machine["device"]) / FILE
    facts = {"text": corpus.origin, "seconds": options.seconds, "demo_seconds": options.demo_seconds}
    facts["threads"] = os.environ.get("OMP_NUM_THREADS")
    result = json.loads(path.read_text()) if path.exists() else {**facts, "machine": machine, "runs": {}}
    if {name: result[name] for name in facts} != facts:
        raise ValueError(f"{path}: the result of other settings is here already; delete it, or choose another --out")
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda name=name: run_entropy_model(name, texts, options.seconds) for name in MODELS
    }
    jobs |= {
        f"BLT on {name}, seed {seed}": lambda name=name, seed=seed: run_blt(name, texts, seed, options.demo_seconds)
        for seed in SEEDS
        for name in ("tiny", "ngram")
    }
    for name, job in jobs.items():
        if name not in result["runs"]:
            result["runs"][name] = job()
            write_json(path, result)
        done = result["runs"][name]
        print(
            f"{name}: {done['bits_per_byte']:.3f} bits per byte, {done['steps']} steps, {done['seconds']:.0f} s",
            flush=True,
        )
    print(path)
