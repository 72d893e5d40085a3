"""Speed and memory of one model, and of fused beside reference ops."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from blt_kernels import use_backend
from blt_kernels.data import Batch, ByteTokenizer, DocumentStream
from blt_kernels.model import BLT, BLTConfig, EntropyModel
from blt_kernels.tokens import PAD_ID
from blt_kernels.training.optim import OptimConfig, Optimizers
from blt_kernels.training.patcher import Patcher
from blt_kernels.training.step import training_step

from ..timing import peak_bytes
from .contenders import Model
from .jobs import Job, Scale
from .models import build
from .texts import Texts, take
from .training import best_rate, optim_config

if TYPE_CHECKING:
    from .run import Bench

WARM_UP = 3
BATCHES = 8  # that are trained on in turn


def measure_speed(bench: Bench, job: Job) -> None:
    """Training, prefill and preparation of a model whose weights need not be trained, on text cut by a patcher that is.

    Training batches are made beforehand by the loader, whose time is not part of this. On a GPU the compiled model is
    measured as well.
    """
    model = bench.model(bench.sizes[job.size], job.model)
    batches = training_batches(bench.texts, model, BATCHES)
    prompts, prompt_bytes = full_rows(bench.texts, bench.scale, model)
    built = build(model.config, seed=0, cross_attention=model.cross_attention).to(bench.device)
    tokens = torch.from_numpy(prompts).to(bench.device)

    def measure() -> dict[str, Any]:
        seconds = bench.scale.throughput_seconds
        return train_speed(built, batches, seconds) | {
            "prefill_bytes_per_second": prompt_bytes / prefill_seconds(built, tokens, model.patcher, seconds)
        }

    measured = measure()
    if bench.device.type == "cuda":
        built.compile()
        measured["compiled"] = measure()
    measured["preparation_bytes_per_second"] = preparation_speed(bench.texts, bench.scale, model)
    measured["used_tokens"] = float(np.mean([batch.num_tokens / batch.tokens.shape[1] for batch in batches]))
    if model.patcher is not None:
        slots = [batch.patch_lengths for batch in batches if batch.patch_lengths is not None]
        measured["used_slots"] = float(np.mean(np.stack(slots) > 0))
    bench.finish(job, bench.record(job, built, model) | {"measured": measured})


def compare_backends(bench: Bench, job: Job) -> None:
    """The same training run on fused and on reference ops: same weights, same batches."""
    size = bench.sizes[job.size]
    model = bench.model(size, job.model)
    assert isinstance(model.config, BLTConfig)
    batches = training_batches(bench.texts, model, size.backend_steps)
    optim = optim_config(best_rate(bench.scale, bench.folder, size, job.model), warmup_steps=4)
    runs: dict[str, Any] = {}
    for name, backend in (("fused", bench.device.type), ("reference", "reference")):
        step = stepper(build(model.config, seed=0).to(bench.device), optim)
        losses, seconds = [], []
        with use_backend(backend):
            for batch in batches:
                begin = time.perf_counter()
                losses.append(step(batch))
                seconds.append(time.perf_counter() - begin)
        runs[name] = {"losses": losses, "seconds": seconds}
    fused, reference = runs["fused"], runs["reference"]
    differences = [abs(a - b) for a, b in zip(fused["losses"], reference["losses"], strict=True)]
    ours, theirs = (statistics.median(run["seconds"][WARM_UP:]) for run in (fused, reference))
    measured = runs | {"largest_difference": max(differences), "time_ratio": theirs / ours}
    built = build(model.config, seed=0)
    bench.finish(job, bench.record(job, built, model) | {"measured": measured})


def train_speed(model: BLT | EntropyModel, batches: list[Batch], seconds: float) -> dict[str, float]:
    """train_bytes_per_second by the median step; peak_memory_bytes of a step: with weights, gradients, optimiser.

    Args:
        seconds: to spend, at least.
    """
    device = next(model.parameters()).device
    model.train()
    step, turn = stepper(model, OptimConfig()), itertools.cycle(batches)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    peak = peak_bytes(lambda: step(batches[0]), device)  # the first step makes the state of the optimiser
    median = median_seconds(lambda: step(next(turn)), device, seconds, len(batches))
    mean_bytes = statistics.mean(batch.num_bytes for batch in batches)
    return {"train_bytes_per_second": mean_bytes / median, "peak_memory_bytes": weights + peak}


def stepper(model: BLT | EntropyModel, optim: OptimConfig) -> Callable[[Batch], float]:
    """The training step of the Trainer, in the precision of the suite. It returns the mean loss in nats."""
    autocast = next(model.parameters()).device.type == "cuda"
    optimizers = Optimizers(model, optim, 1 << 30)
    return lambda batch: training_step(model, [batch], optimizers, autocast=autocast)[0].mean.item()


def prefill_seconds(model: BLT | EntropyModel, tokens: torch.Tensor, patcher: Patcher | None, seconds: float) -> float:
    """Median seconds of entropies, patches and logits of every position; making the tokens is not part of it."""
    device = tokens.device
    model.eval()

    def prefill() -> torch.Tensor:
        if patcher is None:
            return model(tokens)
        return model(tokens, patcher.layout(tokens).trim(multiple_of=8))

    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return median_seconds(prefill, device, seconds, 1)


def preparation_speed(texts: Texts, scale: Scale, model: Model) -> float:
    """Bytes per second at which documents become tokens or patches."""
    documents = list(take(texts.train, scale.calibration_bytes))
    tokenizer = model.tokenizer or ByteTokenizer()
    begin = time.perf_counter()
    for document in documents:
        tokens = tokenizer.encode(document)
        if model.patcher is not None:
            model.patcher(tokens)
    return sum(map(len, documents)) / (time.perf_counter() - begin)


def training_batches(texts: Texts, model: Model, count: int) -> list[Batch]:
    return list(itertools.islice(model.batches(DocumentStream(texts.train, seed=0)), count))


def full_rows(texts: Texts, scale: Scale, model: Model) -> tuple[NDArray[np.int64], int]:
    """A batch of full rows of training text, int64 [B, N], and the bytes of text in it.

    Only a token model's rows are padded (on the right): the same bytes are not as many tokens in each.

    Raises:
        ValueError: no document is long enough.
    """
    want, rows = scale.sequence_bytes, []
    tokenizer = model.tokenizer or ByteTokenizer()
    num_bytes = 0
    for document in DocumentStream(texts.train, seed=0, epochs=1):
        if len(document) >= want:
            text = document[:want].decode(errors="ignore").encode()
            rows.append(tokenizer.encode(text)[:-1])  # without EOS
            num_bytes += len(text)
        if len(rows) == scale.batch_size:
            break
    if not rows:
        raise ValueError(f"{texts.name}: expected documents of at least {want} bytes for a prefill, got none")
    prompts = np.full((len(rows), max(map(len, rows))), PAD_ID, np.int64)
    for prompt, row in zip(prompts, rows, strict=True):
        prompt[: len(row)] = row
    return prompts, num_bytes


def median_seconds(call: Callable[[], Any], device: torch.device, seconds: float, least: int) -> float:
    """Of calls that take `seconds` in all, and of `least` calls at least, after a few that do not count."""
    times: list[float] = []
    for _ in range(WARM_UP):
        call()
    while len(times) < least or sum(times) < seconds:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
