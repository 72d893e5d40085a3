"""Runs the jobs of a scale: skips what is finished, resumes what is not, writes each job's JSON as it goes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.ops.harness import describe_machine
from benchmarks.store import write_json
from blt_kernels.cli.progress import training_progress
from blt_kernels.data import Batch, ByteTokenizer, DocumentStream, PackedBatches, Tokenizer
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig
from blt_kernels.model.flops import Ledger, entropy_model_flops, token_flops
from blt_kernels.tokens import PAD_ID
from blt_kernels.training.evaluate import bits_per_byte, held_out_batches, watch
from blt_kernels.training.optim import OptimConfig
from blt_kernels.training.patcher import Patcher, PatcherConfig
from blt_kernels.training.rows import RowShape
from blt_kernels.training.runs import entropy_patcher, row_tokens_for
from blt_kernels.training.trainer import METRICS_FILE, TrainConfig, Trainer, load_model

from . import results
from .jobs import ENTROPY, TABLE_RATE, Job, Scale, Size
from .models import TOKEN, VARIANTS, Variant, build, grow_latent, variant_flops
from .texts import Texts, take
from .throughput import compare_backends, measure
from .tokens import BPETokenizer

SAMPLED_BATCHES = 16  # to know the bytes of a batch before the number of steps is fixed
THROUGHPUT_BATCHES = 8
ENTROPY_RATE = 6e-3
REPORTED_COUNTS = ("paper", "inclusive")
# What cannot be interrupted is not begun with less time left than this.
RESERVED_SECONDS = {"throughput": 120.0, "backends": 60.0}


class OutOfTime(Exception):
    """The piece of time that was given is over; what is done is kept."""


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the compared models, with all that its runs need.

    Attributes:
        unit_bytes: mean bytes of a token, or of a patch.
        shape: rows that hold the scale's bytes, whatever the unit.
        batch_bytes: mean bytes of text in a training batch.
        flops: by count ("paper" and "inclusive"), per byte of text.
    """

    name: str
    config: BLTConfig | EntropyModelConfig
    cross_attention: bool
    unit_bytes: float
    shape: RowShape
    batch_bytes: float
    flops: dict[str, Ledger]
    patcher: Patcher | None
    tokenizer: Tokenizer | None

    def batches(self, documents: DocumentStream) -> PackedBatches:
        return self.shape.batches(documents, self.patcher, tokenizer=self.tokenizer)


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
        device: str,
        console: Console,
        deadline: float | None = None,
    ):
        self.scale, self.texts, self.folder, self.device = scale, texts, folder, torch.device(device)
        self.console, self.deadline = console, deadline
        self.work = folder / ".work" / texts.fingerprint
        self.sizes = {size.name: size for size in scale.sizes}
        self._machine = describe_machine(self.device)
        self._models: dict[tuple[str, str], Model] = {}
        self._patchers: dict[tuple[str, float | None], tuple[Patcher, float]] = {}

    def run(self, job: Job) -> bool:
        """Runs a job unless it is finished; False where it was.

        Raises:
            ValueError: its JSON is damaged, or was made from other text.
            OutOfTime: the deadline has passed; run again to go on.
        """
        if self.finished(job):
            return False
        self._check_time(RESERVED_SECONDS.get(job.kind, 0.0))
        if job.kind == "entropy":
            self._train_entropy_model()
        elif job.kind == "throughput":
            self._throughput(job)
        elif job.kind == "backends":
            self._backends(job)
        else:
            self._train(job)
        return True

    def path(self, job: Job) -> Path:
        return self.folder / f"{job.name}.json"

    def finished(self, job: Job) -> bool:
        result = results.read(self.path(job))
        if result is None:
            return False
        if result["data"]["fingerprint"] != self.texts.fingerprint:
            raise ValueError(f"{self.path(job)}: made from other text ({result['data']['name']}); choose another --out")
        return bool(result["finished"])

    # ---- what models are made of -------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self) -> BPETokenizer:
        path = self.work / "tokenizer.json"
        if not path.exists():
            self.console.print(f"training a BPE tokenizer of {self.scale.vocab_size} tokens")
            documents = take(self.texts.train, self.scale.tokenizer_bytes)
            BPETokenizer.train(documents, self.scale.vocab_size).save(path)
        return BPETokenizer.load(path)

    @functools.cached_property
    def entropy_model(self) -> EntropyModel:
        """Trained, in eval mode; the same for every BLT of the scale."""
        run = self.work / ENTROPY
        steps = self._entropy_steps()
        if not (run / f"step-{steps:08d}").exists():
            self._train_entropy_model()
        model, _, _ = load_model(run)
        assert isinstance(model, EntropyModel)
        return model.to(self.device)

    def patcher(self, method: str, patch_size: float | None) -> tuple[Patcher, float]:
        """A patcher, and the mean bytes of its patches on the beginning of the training text."""
        key = method, patch_size
        if key not in self._patchers:
            if method == "entropy":
                assert patch_size is not None
                patcher = entropy_patcher(
                    self.entropy_model,
                    self.texts.train,
                    threshold=None,
                    patch_size=patch_size,
                    seed=0,
                    calibration_bytes=self.scale.calibration_bytes,
                )
            else:
                patcher = Patcher(PatcherConfig(method, patch_size=None if patch_size is None else int(patch_size)))
            self._patchers[key] = patcher, self._unit_bytes(patcher, None)
        return self._patchers[key]

    def _unit_bytes(self, patcher: Patcher | None, tokenizer: Tokenizer | None) -> float:
        """Mean bytes of text of a patch or token."""
        loader = RowShape(1, 1 << 16, 1 << 16 if patcher else None)
        num_bytes = units = 0
        for batch in loader.batches(DocumentStream(self.texts.train, epochs=1), patcher, tokenizer=tokenizer):
            num_bytes += batch.num_bytes
            units += int(batch.seq_lens.sum() if batch.patch_lengths is None else (batch.patch_lengths > 0).sum())
            if num_bytes >= self.scale.calibration_bytes:
                break
        return num_bytes / units

    def model(self, size: Size, name: str) -> Model:
        """A model of the comparison; a BLT is grown to the inclusive FLOPs per byte of the token model."""
        if (size.name, name) not in self._models:
            self._models[size.name, name] = self._make_model(size, name)
        return self._models[size.name, name]

    def _make_model(self, size: Size, name: str) -> Model:
        return self._token_model(size) if name == TOKEN else self._blt(size, VARIANTS[name])

    def _token_model(self, size: Size) -> Model:
        row_bytes, unit = self.scale.row_bytes, self._unit_bytes(None, self.tokenizer)
        config = EntropyModelConfig(size.token, self.tokenizer.vocab_size)
        shape = RowShape(self.scale.batch_size, 8 * round(row_bytes / unit / 8))
        flops = {
            count: token_flops(size.token, config.vocab_size, unit, context_bytes=row_bytes, count=count)
            for count in REPORTED_COUNTS
        }
        batch_bytes = self._batch_bytes(shape, None, self.tokenizer)
        return Model(TOKEN, config, True, unit, shape, batch_bytes, flops, None, self.tokenizer)

    def _blt(self, size: Size, variant: Variant) -> Model:
        row_bytes = self.scale.row_bytes
        patcher, unit = self.patcher(variant.method, variant.patch_size)
        owner = None if patcher.entropy_model is None else patcher.entropy_model.config

        def ledger(config: BLTConfig, count: str) -> Ledger:
            return variant_flops(variant, config, unit, context_bytes=row_bytes, entropy_model=owner, count=count)

        config = grow_latent(
            size.blt if variant.ngrams else dataclasses.replace(size.blt, ngram_sizes=()),
            self.model(size, TOKEN).flops["inclusive"].forward,
            lambda grown: ledger(grown, "inclusive").forward,
            aspect=size.token.dim / size.token.num_layers,
        )
        patches = 8 * round(row_bytes / unit / 8)
        shape = RowShape(self.scale.batch_size, row_tokens_for(patches, unit), patches)
        flops = {count: ledger(config, count) for count in REPORTED_COUNTS}
        batch_bytes = self._batch_bytes(shape, patcher, None)
        return Model(variant.name, config, variant.cross_attention, unit, shape, batch_bytes, flops, patcher, None)

    def _batch_bytes(self, shape: RowShape, patcher: Patcher | None, tokenizer: Tokenizer | None) -> float:
        loader = shape.batches(DocumentStream(self.texts.train, seed=0), patcher, tokenizer=tokenizer)
        return sum(next(loader).num_bytes for _ in range(SAMPLED_BATCHES)) / SAMPLED_BATCHES

    # ---- training ----------------------------------------------------------------------------------------------------

    def _train(self, job: Job) -> None:
        size = self.sizes[job.size]
        model = self.model(size, job.model)
        token = self.model(size, TOKEN)
        budget = size.train_bytes * token.flops["inclusive"].training
        if job.kind == "tune":
            budget *= self.scale.tuning_share
        steps = max(2, round(budget / (model.flops["inclusive"].training * model.batch_bytes)))
        rate = job.rate if job.rate is not None else self.best_rate(size, job.model)
        built = build(model.config, seed=job.seed, cross_attention=model.cross_attention).to(self.device)
        result = self._record(job, built, model)
        result["training"] = {
            "rate": rate,
            "table_rate": TABLE_RATE * rate,
            "steps": steps,
            "batch_bytes": model.batch_bytes,
        }
        valid = list(held_out_batches(self.texts.valid, model.shape, model.patcher, tokenizer=model.tokenizer))
        batches = model.batches(DocumentStream(self.texts.train, seed=job.seed))
        try:
            trained = self._fit(job, result, built, batches, valid, steps, rate, model.flops["inclusive"].training)
        except FloatingPointError:
            if job.kind != "tune":
                raise
            self._finish(job, result | {"curve": [], "diverged": True})  # a rate that is too high: others will do
            return
        if job.kind != "tune":
            wanted = self.texts.test if job.model in size.robust and job.seed == 0 else {"clean": None}
            for name in wanted:
                self._check_time()
                held_out = held_out_batches(
                    self.texts.test[name], model.shape, model.patcher, tokenizer=model.tokenizer
                )
                bits, count = bits_per_byte(trained, held_out)
                result.setdefault("test", {})[name] = {"bits_per_byte": bits, "bytes": count}
        self._finish(job, result)
        shutil.rmtree(self.work / job.name)

    def _entropy_steps(self) -> int:
        return max(2, round(self.scale.entropy_train_bytes / (self.scale.row_bytes * self.scale.batch_size)))

    def _train_entropy_model(self) -> None:
        job = Job(ENTROPY, "entropy", "", ENTROPY)
        config, row_bytes = self.scale.entropy_model, self.scale.row_bytes
        model = build(config, seed=0).to(self.device)
        ledgers = {
            count: entropy_model_flops(config, context_bytes=row_bytes, count=count) for count in REPORTED_COUNTS
        }
        shape = RowShape(self.scale.batch_size, row_bytes)
        result = self._record(job, model, Model(ENTROPY, config, True, 1.0, shape, 0.0, ledgers, None, None))
        steps = self._entropy_steps()
        batch_bytes = row_bytes * self.scale.batch_size
        result["training"] = {"rate": ENTROPY_RATE, "table_rate": None, "steps": steps, "batch_bytes": batch_bytes}
        valid = list(held_out_batches(self.texts.valid, shape))
        batches = shape.batches(DocumentStream(self.texts.train, seed=0))
        self._fit(job, result, model, batches, valid, steps, ENTROPY_RATE, ledgers["inclusive"].training)
        self._finish(job, result)

    def _fit(
        self,
        job: Job,
        result: dict[str, Any],
        model: BLT | EntropyModel,
        batches: PackedBatches,
        valid: list[Batch],
        steps: int,
        rate: float,
        training_flops: float,
    ) -> BLT | EntropyModel:
        """Trains from the start or from where the job was interrupted; the trained model, in eval mode."""
        run = self.work / job.name
        # Of a tuning run only the end counts.
        each = steps if job.kind == "tune" else max(1, steps // self.scale.evaluations)
        config = TrainConfig(
            steps,
            OptimConfig(
                learning_rate=rate,
                sparse_learning_rate=TABLE_RATE * rate,
                warmup_steps=max(1, round(self.scale.warmup_share * steps)),
            ),
            autocast=self.device.type == "cuda",
            log_every=steps,
            eval_every=each,
            checkpoint_every=each,
            seed=job.seed,
        )

        with training_progress(self.console, job.name, steps) as show:

            def on_step(metrics: dict[str, Any]) -> None:
                show(metrics)
                if "held_out_bits_per_byte" in metrics:
                    result["curve"] = _curve(run, training_flops)
                    write_json(self.path(job), result)
                self._check_time()

            trainer = Trainer(model, batches, config, run, evaluate=watch(valid), on_step=on_step)
            trainer.resume()
            trainer.train()
        result["curve"] = _curve(run, training_flops)
        return model.eval()

    def best_rate(self, size: Size, name: str) -> float:
        """The learning rate that did best on the validation text in this model's tuning runs.

        Raises:
            ValueError: they are not finished.
        """
        if len(self.scale.rates) == 1:
            return self.scale.rates[0]
        tuned_as = name if name == TOKEN else VARIANTS[name].tuned_as or name
        bits = {}
        for rate in self.scale.rates:
            path = self.folder / f"{size.name}-tune-{tuned_as}-rate{rate:g}.json"
            result = results.read(path)
            if result is None or not result["finished"]:
                raise ValueError(f"{name}: its learning rate is not tuned yet: {path.name} is missing or unfinished")
            bits[rate] = math.inf if result.get("diverged") else result["curve"][-1]["valid_bits_per_byte"]
        return min(bits, key=lambda rate: bits[rate])

    # ---- speed -------------------------------------------------------------------------------------------------------

    def _throughput(self, job: Job) -> None:
        model = self.model(self.sizes[job.size], job.model)
        batches = self._batches(model, THROUGHPUT_BATCHES)
        prompts, prompt_bytes = self._prompts(model)
        built = build(model.config, seed=0, cross_attention=model.cross_attention).to(self.device)
        seconds = self.scale.throughput_seconds
        measured = measure(built, batches, prompts, prompt_bytes, model.patcher, seconds)
        measured["preparation_bytes_per_second"] = self._preparation(model)
        measured["used_tokens"] = float(np.mean([batch.seq_lens.mean() / batch.tokens.shape[1] for batch in batches]))
        if model.patcher is not None:
            slots = [batch.patch_lengths for batch in batches if batch.patch_lengths is not None]
            measured["used_slots"] = float(np.mean(np.stack(slots) > 0))
        result = self._record(job, built, model)
        result["measured"] = measured
        self._finish(job, result)

    def _backends(self, job: Job) -> None:
        size = self.sizes[job.size]
        model = self.model(size, job.model)
        assert isinstance(model.config, BLTConfig)
        batches = self._batches(model, size.backend_steps)
        result = self._record(job, build(model.config, seed=0), model)
        rate = self.best_rate(size, job.model)
        optim = OptimConfig(learning_rate=rate, sparse_learning_rate=TABLE_RATE * rate, warmup_steps=4)
        result["measured"] = compare_backends(model.config, batches, self.device, optim)
        self._finish(job, result)

    def _batches(self, model: Model, count: int) -> list[Batch]:
        return list(itertools.islice(model.batches(DocumentStream(self.texts.train, seed=0)), count))

    def _preparation(self, model: Model) -> float:
        """Bytes per second at which documents become tokens or patches."""
        documents = list(take(self.texts.train, self.scale.calibration_bytes))
        tokenizer = model.tokenizer or ByteTokenizer()
        begin = time.perf_counter()
        for document in documents:
            tokens = tokenizer.encode(document)
            if model.patcher is not None:
                model.patcher(tokens)
        return sum(map(len, documents)) / (time.perf_counter() - begin)

    def _prompts(self, model: Model) -> tuple[np.ndarray, int]:
        """A batch of full rows of training text, int64 [B, N], and the bytes in it."""
        want, rows = self.scale.row_bytes, []
        tokenizer = model.tokenizer or ByteTokenizer()
        num_bytes = 0
        for document in DocumentStream(self.texts.train, seed=0, epochs=1):
            text = document[:want].decode(errors="ignore").encode()
            if len(document) >= want:
                rows.append(tokenizer.encode(text)[:-1])  # without EOS
                num_bytes += len(text)
            if len(rows) == self.scale.batch_size:
                break
        if not rows:
            raise ValueError(f"{self.texts.name}: expected documents of at least {want} bytes for a prefill, got none")
        prompts = np.full((len(rows), max(map(len, rows))), PAD_ID, np.int64)
        for prompt, row in zip(prompts, rows, strict=True):
            prompt[: len(row)] = row
        return prompts, num_bytes

    # ---- the record --------------------------------------------------------------------------------------------------

    def _record(self, job: Job, built: BLT | EntropyModel, model: Model) -> dict[str, Any]:
        tables = getattr(built, "encoder_hash_tok_embedding", None)
        inclusive = model.flops["inclusive"]
        target = self.model(self.sizes[job.size], TOKEN).flops["inclusive"].forward if job.size else None
        valid_bytes = sum(map(len, self.texts.valid))
        return {
            "format": results.FORMAT,
            "job": job.name,
            "kind": job.kind,
            "scale": self.scale.name,
            "smoke": self.scale.smoke,
            "finished": False,
            "machine": self._machine,
            "data": {"name": self.texts.name, "fingerprint": self.texts.fingerprint, "valid_bytes": valid_bytes},
            "size": job.size,
            "seed": job.seed,
            "model": {
                "name": job.model,
                "config": model.config.to_dict(),
                "cross_attention": model.cross_attention,
                "parameters": sum(parameter.numel() for parameter in built.parameters()),
                "table_parameters": 0 if tables is None else tables.weight.numel(),
                "unit_bytes": model.unit_bytes,
                "context": dataclasses.asdict(model.shape),
                "patcher": None if model.patcher is None else dataclasses.asdict(model.patcher.config),
            },
            "flops": {
                "paper": model.flops["paper"].forward,
                "inclusive": inclusive.forward,
                "training": inclusive.training,
                "target": target,
                "components": inclusive.components,
            },
        }

    def _finish(self, job: Job, result: dict[str, Any]) -> None:
        write_json(self.path(job), result | {"finished": True})

    def _check_time(self, reserve: float = 0.0) -> None:
        if self.deadline is not None and time.monotonic() + reserve > self.deadline:
            raise OutOfTime


def _curve(run: Path, training_flops: float) -> list[dict[str, Any]]:
    points = []
    for line in (run / METRICS_FILE).read_text().splitlines():
        metrics = json.loads(line)
        if "held_out_bits_per_byte" in metrics:
            points.append(
                {
                    "step": metrics["step"],
                    "bytes": metrics["bytes"],
                    "seconds": metrics["seconds"],
                    "training_flops": training_flops * metrics["bytes"],
                    "train_bits_per_byte": metrics["bits_per_byte"],
                    "valid_bits_per_byte": metrics["held_out_bits_per_byte"],
                }
            )
    return points
