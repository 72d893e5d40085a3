"""Training runs of the comparison: of the entropy model, for a learning rate, and the ones that are compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blt_kernels.cli.progress import training_progress
from blt_kernels.data import Batch, DocumentStream, PackedBatches
from blt_kernels.model import BLT, EntropyModel
from blt_kernels.model.flops import entropy_model_flops
from blt_kernels.training.evaluate import bits_per_byte, held_out_batches, watch
from blt_kernels.training.lanes import Lanes
from blt_kernels.training.optim import OptimConfig
from blt_kernels.training.rows import RowShape
from blt_kernels.training.runs import entropy_order
from blt_kernels.training.trainer import METRICS_FILE, TrainConfig, Trainer

from . import results
from .contenders import REPORTED_COUNTS, Model
from .jobs import TABLE_OPTIMIZER, TABLE_RATE, Job, Scale, Size, entropy_job
from .models import TOKEN, VARIANTS, build

if TYPE_CHECKING:
    from .run import Bench

ENTROPY_RATE = 6e-3


def train(bench: Bench, job: Job) -> None:
    """Trains and evaluates the model of a job on the training FLOPs of the token model; a tuning run gets a share."""
    size = bench.sizes[job.size]
    model, token = bench.model(size, job.model), bench.model(size, TOKEN)
    training_flops = model.flops["inclusive"].training
    budget = size.train_bytes * token.flops["inclusive"].training
    if job.kind == "tune":
        budget *= bench.scale.tuning_share
    steps = max(2, round(budget / (training_flops * model.batch_bytes)))
    rate = job.rate if job.rate is not None else best_rate(bench.scale, bench.folder, size, job.model)
    built = build(model.config, seed=job.seed, cross_attention=model.cross_attention).to(bench.device)
    result = bench.record(job, built, model)
    result["training"] = {
        "rate": rate,
        "table_rate": TABLE_RATE * rate,
        "steps": steps,
        "batch_bytes": model.batch_bytes,
    }
    valid = list(held_out_batches(bench.texts.valid, model.shape, model.patcher, tokenizer=model.tokenizer))
    batches = model.batches(DocumentStream(bench.texts.train, seed=job.seed))
    try:
        trained = fit(bench, job, result, built, batches, valid, steps, rate, training_flops)
    except FloatingPointError:
        if job.kind != "tune":
            raise
        bench.finish(job, result | {"curve": [], "diverged": True})  # the rate is too high, and another one is chosen
        return
    if job.kind != "tune":
        wanted = bench.texts.test if job.model in size.robust and job.seed == 0 else {"clean": None}
        for name in wanted:
            bench.check_time()
            held_out = held_out_batches(bench.texts.test[name], model.shape, model.patcher, tokenizer=model.tokenizer)
            bits, count = bits_per_byte(trained, held_out)
            result.setdefault("test", {})[name] = {"bits_per_byte": bits, "bytes": count}
    bench.finish(job, result)
    shutil.rmtree(bench.work / job.name)


def train_entropy_model(bench: Bench, name: str) -> EntropyModel:
    """An entropy model of the scale in eval mode, trained now unless its last checkpoint is there."""
    scale, job = bench.scale, entropy_job(name)
    config = scale.entropy_models[name]
    model = build(config, seed=0).to(bench.device)
    assert isinstance(model, EntropyModel)
    flops = {
        count: entropy_model_flops(config, context_bytes=scale.sequence_bytes, count=count) for count in REPORTED_COUNTS
    }
    batch_bytes = scale.batch_size * scale.sequence_bytes
    shape = RowShape(batch_bytes, scale.sequence_bytes)
    result = bench.record(job, model, Model(name, config, 1.0, shape, batch_bytes, flops))
    steps = max(2, round(scale.entropy_train_bytes / batch_bytes))
    result["training"] = {
        "rate": ENTROPY_RATE,
        "table_rate": TABLE_RATE * ENTROPY_RATE if config.ngram_sizes else None,
        "steps": steps,
        "batch_bytes": batch_bytes,
    }
    valid = list(held_out_batches(bench.texts.valid, shape))
    batches = shape.batches(DocumentStream(bench.texts.train, seed=entropy_order(0)))
    fit(bench, job, result, model, batches, valid, steps, ENTROPY_RATE, flops["inclusive"].training)
    if not bench.finished(job):
        bench.finish(job, result)
    return model


def fit(
    bench: Bench,
    job: Job,
    result: dict[str, Any],
    model: BLT | EntropyModel,
    batches: PackedBatches,
    valid: list[Batch],
    steps: int,
    rate: float,
    training_flops: float,
) -> BLT | EntropyModel:
    """Trains from the start or from where the job was interrupted; the trained model, in eval mode.

    The curve goes into `result`, which is written at each of its points.
    """
    run = bench.work / job.name
    # Of a tuning run only the end counts.
    each = steps if job.kind == "tune" else max(1, steps // bench.scale.evaluations)
    config = TrainConfig(
        steps,
        optim_config(rate, warmup_steps=max(1, round(bench.scale.warmup_share * steps))),
        autocast=bench.device.type == "cuda",
        log_every=steps,
        eval_every=each,
        checkpoint_every=each,
        seed=job.seed,
    )
    with training_progress(bench.console, job.name, steps) as show:

        def on_step(metrics: dict[str, Any]) -> None:
            show(metrics)
            if "held_out_bits_per_byte" in metrics:
                result["curve"] = curve(run, training_flops)
                bench.save(job, result)
            bench.check_time()

        trainer = Trainer(model, Lanes([batches]), config, run, evaluate=watch(valid), on_step=on_step)
        trainer.resume()
        trainer.train()
    result["curve"] = curve(run, training_flops)
    return model.eval()


def optim_config(rate: float, *, warmup_steps: int) -> OptimConfig:
    """AdamW at `rate`, and the n-gram tables at a fixed multiple of it."""
    return OptimConfig(
        learning_rate=rate,
        sparse_learning_rate=TABLE_RATE * rate,
        warmup_steps=warmup_steps,
        table_optimizer=TABLE_OPTIMIZER,
    )


def best_rate(scale: Scale, folder: Path, size: Size, name: str) -> float:
    """The learning rate that did best on the validation text in this model's tuning runs.

    Args:
        folder: of the results of the scale.

    Raises:
        ValueError: they are not finished.
    """
    if len(scale.rates) == 1:
        return scale.rates[0]
    tuned_as = name if name == TOKEN else VARIANTS[name].tuned_as or name
    bits = {}
    for rate in scale.rates:
        path = folder / f"{size.name}-tune-{tuned_as}-rate{rate:g}.json"
        result = results.read(path)
        if result is None or not result["finished"]:
            raise ValueError(f"{name}: its learning rate is not tuned yet: {path.name} is missing or unfinished")
        bits[rate] = results.final_bits(result)
    return min(bits, key=lambda rate: bits[rate])


def curve(run: Path, training_flops: float) -> list[dict[str, Any]]:
    """The evaluations that the trainer has written down, as the points of a result's curve."""
    lines = map(json.loads, (run / METRICS_FILE).read_text().splitlines())
    return [
        {
            "step": metrics["step"],
            "bytes": metrics["bytes"],
            "seconds": metrics["seconds"],
            "training_flops": training_flops * metrics["bytes"],
            "train_bits_per_byte": metrics["bits_per_byte"],
            "valid_bits_per_byte": metrics["held_out_bits_per_byte"],
        }
        for metrics in lines
        if "held_out_bits_per_byte" in metrics
    ]
