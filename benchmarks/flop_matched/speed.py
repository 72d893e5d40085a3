"""Speed and memory of a BLT beside the token model, and of fused beside reference ops."""

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
from blt_kernels.training.step import training_step

from ..timing import peak_bytes
from .contenders import Model
from .jobs import Job, Scale, Size
from .models import TOKEN, build
from .texts import Texts, take
from .training import best_rate, optim_config

if TYPE_CHECKING:
    from .run import Bench

WARM_UP = 3
BATCHES = 8  # that are trained on in turn


class Subject:
    """A model whose weights need not be trained, with the text that it is measured on, cut by a patcher that is.

    Training batches are made beforehand by the loader, whose time is not part of what is measured.
    """

    def __init__(self, bench: Bench, name: str, size: Size):
        self.bench, self.model = bench, bench.model(size, name)
        self.batches = training_batches(bench.texts, self.model, BATCHES)
        prompts, self.prompt_bytes = full_rows(bench.texts, bench.scale, self.model)
        self.prompts = torch.from_numpy(prompts).to(bench.device)
        cross_attention = self.model.cross_attention
        self.built = build(self.model.config, seed=0, cross_attention=cross_attention).to(bench.device)
        self._step = stepper(self.built, OptimConfig())
        self._turn = itertools.cycle(self.batches)

    def train(self) -> None:
        self._step(next(self._turn))

    def prefill(self) -> torch.Tensor:
        """Entropies, patches and logits of every position; making the tokens is not part of it."""
        if self.model.patcher is None:
            return self.built(self.prompts)
        return self.built(self.prompts, self.model.patcher.layout(self.prompts).trim(multiple_of=8))

    def facts(self) -> dict[str, float]:
        """What does not depend on what runs beside it: memory of a step, speed of the loader, how full its rows are."""
        self.built.train()
        self.train()  # the first step makes the state of the optimiser
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.built.parameters())
        facts = {
            "peak_memory_bytes": weights + peak_bytes(self.train, self.bench.device),
            "preparation_bytes_per_second": preparation_speed(self.bench.texts, self.bench.scale, self.model),
            "used_tokens": float(np.mean([batch.num_tokens / batch.tokens.shape[1] for batch in self.batches])),
        }
        if self.model.patcher is not None:
            slots = [batch.patch_lengths for batch in self.batches if batch.patch_lengths is not None]
            facts["used_slots"] = float(np.mean(np.stack(slots) > 0))
        return facts


def measure_speed(bench: Bench, job: Job) -> None:
    """Training and prefill of a BLT and of the token model in turn, step by step, so that what else the machine does
    slows both alike. On a GPU the compiled models are measured as well."""
    size = bench.sizes[job.size]
    subjects = [Subject(bench, name, size) for name in dict.fromkeys((job.model, TOKEN))]
    facts = [subject.facts() for subject in subjects]
    speeds = together(subjects, bench.scale.throughput_seconds)
    if bench.device.type == "cuda":
        for subject in subjects:
            subject.built.compile()
        for speed, compiled in zip(speeds, together(subjects, bench.scale.throughput_seconds), strict=True):
            speed["compiled"] = compiled
    ours, *twins = (
        bench.record(job, subject.built, subject.model) | {"measured": speed | fact}
        for subject, speed, fact in zip(subjects, speeds, facts, strict=True)
    )
    twin = {"twin": {name: twins[0][name] for name in ("flops", "measured")}} if twins else {}
    bench.finish(job, ours | twin)


def together(subjects: list[Subject], seconds: float) -> list[dict[str, Any]]:
    """Bytes per second of each subject in training and prefill, by the median of at least `seconds` in all for each."""
    device = subjects[0].bench.device
    for subject in subjects:
        subject.built.train()
    steps = medians([subject.train for subject in subjects], device, seconds, BATCHES)
    for subject in subjects:
        subject.built.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        prefills = medians([subject.prefill for subject in subjects], device, seconds, 1)
    return [
        {
            "train_bytes_per_second": statistics.mean(batch.num_bytes for batch in subject.batches) / step,
            "prefill_bytes_per_second": subject.prompt_bytes / prefill,
        }
        for subject, step, prefill in zip(subjects, steps, prefills, strict=True)
    ]


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


def stepper(model: BLT | EntropyModel, optim: OptimConfig) -> Callable[[Batch], float]:
    """The training step of the Trainer, in the precision of the suite. It returns the mean loss in nats."""
    autocast = next(model.parameters()).device.type == "cuda"
    optimizers = Optimizers(model, optim, 1 << 30)
    return lambda batch: training_step(model, [batch], optimizers, autocast=autocast)[0].mean.item()


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


def medians(calls: list[Callable[[], Any]], device: torch.device, seconds: float, least: int) -> list[float]:
    """Median seconds of each of `calls`, which are made in turn: at least `least` times, and until each has taken
    `seconds` in all, after a few times that do not count."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls * WARM_UP:
        call()
    while len(times[0]) < least or min(map(sum, times)) < seconds:
        for call, mine in zip(calls, times, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            mine.append(time.perf_counter() - begin)
    return [statistics.median(mine) for mine in times]
