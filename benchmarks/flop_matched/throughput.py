"""Speed and memory of one model, measured in a process of its own so that its peak is its own."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from blt_kernels import segment, segment_fixed, segment_spaces, use_backend
from blt_kernels.data import Batch
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig
from blt_kernels.optim import OptimConfig, Optimizers
from blt_kernels.patcher import Patcher
from blt_kernels.train import loss_of

from .models import build

WARM_UP = 3


def measure_apart(**arguments: Any) -> dict[str, Any]:
    """`measure(**arguments)` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, **arguments).result()


def measure(
    *,
    config: BLTConfig | EntropyModelConfig,
    cross_attention: bool,
    batches: list[Batch],
    prompts: np.ndarray,
    prompt_bytes: int,
    patcher: tuple[dict[str, Any], dict[str, torch.Tensor]] | None,
    device: str,
    threads: int,
    seconds: float,
) -> dict[str, Any]:
    """Training and prefill of a model with untrained weights, on text cut by a trained patcher.

    Args:
        batches: made by the loader, whose time is not part of this.
        prompts: int64 [B, N], full rows of text but for padding on the right of a token model's.
        prompt_bytes: bytes of text in `prompts`.
        patcher: state and weights of a Patcher, for a BLT.
        seconds: to spend on each measurement, at least.

    Returns:
        train_bytes_per_second, prefill_bytes_per_second (entropies, patches and logits of every position; making the
        tokens of a token model is not part of it), both from the median time; peak_memory_bytes: of training, beyond
        the process before there was a model on the CPU, allocated on a GPU. On a GPU the same of compiled models
        under "compiled".
    """
    torch.set_num_threads(threads)
    before = _peak_rss()
    model = build(config, seed=0, cross_attention=cross_attention).to(device)
    result = _speeds(model, batches, prompts, prompt_bytes, patcher, seconds, before)
    if device != "cpu":
        model.compile()
        result["compiled"] = _speeds(model, batches, prompts, prompt_bytes, patcher, seconds, before)
    return result


def _speeds(
    model: BLT | EntropyModel,
    batches: list[Batch],
    prompts: np.ndarray,
    prompt_bytes: int,
    patcher: tuple[dict[str, Any], dict[str, torch.Tensor]] | None,
    seconds: float,
    before: int,
) -> dict[str, Any]:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = trainer_step(model)
    turn = iter(range(1 << 62))
    train = _median_seconds(lambda: step(batches[next(turn) % len(batches)]), device, seconds, len(batches))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak_rss() - before
    model.eval()
    prefill = _prefill(model, torch.from_numpy(prompts).to(device), patcher)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        forward = _median_seconds(prefill, device, seconds, 1)
    model.train()
    return {
        "train_bytes_per_second": statistics.mean(batch.num_bytes for batch in batches) / train,
        "prefill_bytes_per_second": prompt_bytes / forward,
        "peak_memory_bytes": peak,
    }


def trainer_step(model: BLT | EntropyModel) -> Callable[[Batch], float]:
    """A training step as the Trainer makes it: forward, backward and update. Returns the mean loss in nats."""
    device = next(model.parameters()).device
    optimizers = Optimizers(model, OptimConfig(), 1 << 30)

    def step(batch: Batch) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model, batch).mean
        loss.backward()
        optimizers.step()
        return loss.item()

    return step


def compare_backends(config: BLTConfig, batches: list[Batch], device: str, seed: int) -> dict[str, Any]:
    """The same training run on fused and on reference ops: same weights, same batches.

    Returns:
        By backend, losses in nats and seconds a step; largest_difference of the losses; time_ratio, the median step
        of the reference over that of the fused ops.
    """
    result: dict[str, Any] = {}
    fused = torch.device(device).type
    for backend in (fused, "reference"):
        step = trainer_step(build(config, seed=seed).to(device))
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


def _prefill(
    model: BLT | EntropyModel,
    tokens: torch.Tensor,
    patcher: tuple[dict[str, Any], dict[str, torch.Tensor]] | None,
) -> Callable[[], torch.Tensor]:
    if patcher is None:
        return lambda: model(tokens)
    made = Patcher.from_state(*patcher)
    entropy_model = made.entropy_model.to(tokens.device) if made.entropy_model is not None else None

    def forward() -> torch.Tensor:
        if entropy_model is not None:
            assert made.config.threshold is not None
            layout = segment(entropy_model.entropies(tokens), made.config.threshold)
        elif made.config.method == "spaces":
            layout = segment_spaces(tokens)
        else:
            assert made.config.patch_size is not None
            layout = segment_fixed(tokens, made.config.patch_size)
        return model(tokens, layout.trim(multiple_of=8))

    return forward


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


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
