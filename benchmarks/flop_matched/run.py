"""Runs the jobs of a scale: skips what is finished, resumes what is not, writes each job's JSON as it goes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from blt_kernels.model import BLT, EntropyModel

from ..machine import describe_machine
from ..store import write_json
from . import results
from .contenders import Contenders, Model
from .jobs import Job, Scale, Size
from .models import TOKEN
from .profile import profile_steps
from .speed import compare_backends, measure_speed
from .texts import Texts
from .training import train, train_entropy_model

# What cannot be interrupted is not begun with less time left than this.
RESERVED_SECONDS = {"throughput": 120.0, "profile": 60.0, "backends": 60.0}


class OutOfTime(Exception):
    """The time that was given is over; what is done is kept, and the same command goes on."""


class Bench:
    """What the jobs of a scale share.

    Args:
        folder: where the JSON goes; `.work` in it holds the samples, the tokenizer, and unfinished runs.
        deadline: time.monotonic() after which training stops; None: never.
    """

    def __init__(
        self,
        scale: Scale,
        texts: Texts,
        folder: Path,
        device: torch.device,
        console: Console,
        deadline: float | None = None,
    ):
        self.scale, self.texts, self.folder, self.device = scale, texts, folder, device
        self.console, self.deadline = console, deadline
        self.work = folder / ".work" / texts.fingerprint
        self.sizes = {size.name: size for size in scale.sizes}
        self._machine = describe_machine(self.device)
        self._entropy_models: dict[str, EntropyModel] = {}
        self._contenders = Contenders(scale, texts, self.work, console, self.entropy_model)

    def run(self, job: Job) -> bool:
        """Runs a job unless it is finished; False where it was.

        Raises:
            ValueError: its JSON is damaged, or was made from other text.
            OutOfTime: the deadline has passed; run again to go on.
        """
        if self.finished(job):
            return False
        self.check_time(RESERVED_SECONDS.get(job.kind, 0.0))
        if job.kind == "entropy":
            self.entropy_model(job.model)  # it is trained when it is asked for
        elif job.kind == "throughput":
            measure_speed(self, job)
        elif job.kind == "profile":
            profile_steps(self, job)
        elif job.kind == "backends":
            compare_backends(self, job)
        else:
            train(self, job)
        return True

    def entropy_model(self, name: str) -> EntropyModel:
        """One of the scale's entropy models, trained and in eval mode; the same for every BLT that is cut by it."""
        if name not in self._entropy_models:
            self._entropy_models[name] = train_entropy_model(self, name)
        return self._entropy_models[name]

    def model(self, size: Size, name: str) -> Model:
        """A model of the comparison; a BLT is grown to the inclusive FLOPs per byte of the token model."""
        return self._contenders.model(size, name)

    def path(self, job: Job) -> Path:
        return self.folder / f"{job.name}.json"

    def finished(self, job: Job) -> bool:
        result = results.read(self.path(job))
        if result is None:
            return False
        if result["data"]["fingerprint"] != self.texts.fingerprint:
            raise ValueError(f"{self.path(job)}: made from other text ({result['data']['name']}); choose another --out")
        return bool(result["finished"])

    def record(self, job: Job, built: BLT | EntropyModel, model: Model) -> dict[str, Any]:
        """The result of a job, as far as it is known before the job runs."""
        target = self.model(self.sizes[job.size], TOKEN).flops["inclusive"].forward if job.size else None
        return results.begin(job, self.scale, self._machine, self.texts, built, model, target)

    def save(self, job: Job, result: dict[str, Any]) -> None:
        write_json(self.path(job), result)

    def finish(self, job: Job, result: dict[str, Any]) -> None:
        self.save(job, result | {"finished": True})

    def check_time(self, reserve: float = 0.0) -> None:
        """Raises OutOfTime with less than `reserve` seconds left."""
        if self.deadline is not None and time.monotonic() + reserve > self.deadline:
            raise OutOfTime
