"""Speed and memory of one model."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.timing import peak_bytes
from blt_kernels import use_backend
from blt_kernels.data import Batch
from blt_kernels.model import BLT, BLTConfig, EntropyModel
from blt_kernels.training.optim import OptimConfig, Optimizers
from blt_kernels.training.patcher import Patcher
from blt_kernels.training.step import training_step

from .models import build

WARM_UP = 3


def measure(
    model: BLT | EntropyModel,
    batches: list[Batch],
    prompts: np.ndarray,
    prompt_bytes: int,
    patcher: Patcher | None,
    seconds: float,
) -> dict[str, Any]:
    """Training and prefill of a model whose weights need not be trained, on text cut by a patcher that is.

    Args:
        batches: made by the loader, whose time is not part of this.
        prompts: int64 [B, N], full rows of text but for padding on the right of a token model's.
        prompt_bytes: bytes of text in `prompts`.
        seconds: to spend on each measurement, at least.

    Returns:
        train_bytes_per_second and prefill_bytes_per_second (entropies, patches and logits of every position; making
        the tokens of a token model is not part of it), both from the median time; peak_memory_bytes: of a training
        step, weights, gradients and optimiser state included. On a GPU the same of the compiled model, as "compiled".
    """
    result = _measure(model, batches, prompts, prompt_bytes, patcher, seconds)
    if next(model.parameters()).device.type == "cuda":
        model.compile()
        result["compiled"] = _measure(model, batches, prompts, prompt_bytes, patcher, seconds)
    return result


def _measure(
    model: BLT | EntropyModel,
    batches: list[Batch],
    prompts: np.ndarray,
    prompt_bytes: int,
    patcher: Patcher | None,
    seconds: float,
) -> dict[str, Any]:
    device = next(model.parameters()).device
    model.train()
    step, turn = stepper(model, OptimConfig()), itertools.cycle(batches)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    peak = peak_bytes(lambda: step(batches[0]), device)  # the first step makes the state of the optimiser
    train = _median_seconds(lambda: step(next(turn)), device, seconds, len(batches))
    model.eval()
    prefill = _prefill(model, torch.from_numpy(prompts).to(device), patcher)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        forward = _median_seconds(prefill, device, seconds, 1)
    return {
        "train_bytes_per_second": statistics.mean(batch.num_bytes for batch in batches) / train,
        "prefill_bytes_per_second": prompt_bytes / forward,
        "peak_memory_bytes": weights + peak,
    }


def stepper(model: BLT | EntropyModel, optim: OptimConfig) -> Callable[[Batch], float]:
    """The training step of the Trainer, in the precision of the suite. It returns the mean loss in nats."""
    autocast = next(model.parameters()).device.type == "cuda"
    optimizers = Optimizers(model, optim, 1 << 30)
    return lambda batch: training_step(model, batch, optimizers, autocast=autocast)[0].mean.item()


def compare_backends(
    config: BLTConfig, batches: list[Batch], device: torch.device, optim: OptimConfig
) -> dict[str, Any]:
    """The same training run on fused and on reference ops: same weights, same batches.

    Returns:
        By backend, losses in nats and seconds a step; largest_difference of the losses; time_ratio, the median step
        of the reference over that of the fused ops.
    """
    result: dict[str, Any] = {}
    for backend in (device.type, "reference"):
        step = stepper(build(config, seed=0).to(device), optim)
        losses, seconds = [], []
        with use_backend(backend):
            for batch in batches:
                begin = time.perf_counter()
                losses.append(step(batch))
                seconds.append(time.perf_counter() - begin)
        result["reference" if backend == "reference" else "fused"] = {"losses": losses, "seconds": seconds}
    ours, theirs = result["fused"], result["reference"]
    differences = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    medians = [statistics.median(run["seconds"][WARM_UP:]) for run in (theirs, ours)]
    return result | {"largest_difference": max(differences), "time_ratio": medians[0] / medians[1]}


def _prefill(model: BLT | EntropyModel, tokens: torch.Tensor, patcher: Patcher | None) -> Callable[[], torch.Tensor]:
    if patcher is None:
        return lambda: model(tokens)
    return lambda: model(tokens, patcher.layout(tokens).trim(multiple_of=8))


def _median_seconds(call: Callable[[], Any], device: torch.device, seconds: float, least: int) -> float:
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
