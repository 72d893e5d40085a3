"""The training loop, for the entropy model and for BLT: exact resume, atomic checkpoints, metrics as JSON lines."""

from __future__ import annotations

import dataclasses
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._checks import check_int, fail_value
from ..data import Batch, PackedBatches
from ..layout import PatchLayout
from ..model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, NextByteLoss, bits_per_byte
from .checkpoint import CheckpointError, latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from .optim import OptimConfig, Optimizers
from .patcher import Patcher

METRICS_FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to write on the way.

    Attributes:
        steps: optimiser steps in all.
        optim: see OptimConfig.
        autocast: bfloat16 autocast for matrix products; parameters, losses and entropies stay float32.
        log_every: steps between lines of metrics.
        eval_every: steps between evaluations of the held-out text (and one at the end).
        checkpoint_every: steps between checkpoints (and one at the end).
        seed: of the initial weights.
    """

    steps: int
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    autocast: bool = False
    log_every: int = 10
    eval_every: int = 500
    checkpoint_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every", "checkpoint_every"):
            check_int("TrainConfig", name, getattr(self, name), 1)


def layout_of(batch: Batch, device: torch.device) -> PatchLayout:
    """The layout of a batch that was cut at patch boundaries: C is the loader's constant, nothing can overflow."""
    assert batch.patch_lengths is not None and batch.next_is_start is not None
    packed = batch.tokens.shape[0] == 1
    return PatchLayout.from_lengths(
        torch.from_numpy(batch.patch_lengths).to(device),
        batch.tokens.shape[1],
        seq_lens=None if packed else torch.from_numpy(batch.seq_lens).to(device),
        cu_seqlens=torch.from_numpy(batch.cu_seqlens[0]).to(device) if packed else None,
        next_is_start=torch.from_numpy(batch.next_is_start[0] if packed else batch.next_is_start[:, 0]).to(device),
    )


def loss_of(model: EntropyModel | BLT, batch: Batch) -> NextByteLoss:
    """The next-byte loss of a model on a batch. Rows that hold several sequences need B = 1."""
    device = next(model.parameters()).device
    tokens, targets = (torch.from_numpy(a).to(device) for a in (batch.tokens, batch.targets))
    if batch.tokens.shape[0] > 1 and batch.cu_seqlens.shape[1] > 2:
        raise fail_value("loss_of", "batch", "one sequence a row, or one row", f"shape {batch.tokens.shape}")
    cu_seqlens = torch.from_numpy(batch.cu_seqlens[0]).to(device) if batch.tokens.shape[0] == 1 else None
    if isinstance(model, BLT):
        return model.loss(tokens, targets, layout_of(batch, device), cu_seqlens=cu_seqlens)
    return model.loss(tokens, targets, cu_seqlens=cu_seqlens)


class Prefetch:
    """Makes batches one ahead in a thread, each with the loader's state right after it.

    For training on a device, where the loader's segmentation on the CPU runs beside the step. On the CPU itself both
    want the same cores: two teams of OpenMP threads, each spinning while it waits for the other, run many times
    slower than one after the other, so there is no thread.
    """

    def __init__(self, batches: PackedBatches, *, ahead: bool):
        self._batches = batches
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if ahead else None
        if self._thread is not None:
            self._thread.start()

    def _run(self) -> None:
        item: Any
        try:
            for batch in self._batches:
                self._put((batch, self._batches.state_dict()))
                if self._stop.is_set():
                    return
            item = StopIteration()
        except Exception as error:  # raised again where the batch is wanted
            item = error
        self._put(item)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        if self._thread is None:
            for batch in self._batches:
                yield batch, self._batches.state_dict()
            return
        while True:
            item = self._queue.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """Stops the thread; a batch that was made and not taken is dropped."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


class Trainer:
    """Trains a model on batches, from the start or from the newest checkpoint of its run.

    Args:
        model: an EntropyModel or a BLT.
        batches: the loader; its state goes into every checkpoint.
        config: see TrainConfig.
        run: directory for `metrics.jsonl` and checkpoints.
        patcher: saved with a BLT, so that a checkpoint is all that evaluation needs.
        evaluate: called with the model; returns figures for the metrics, such as held-out bits per byte.
        on_step: called with each line of metrics (a progress bar).
        notes: JSON-able facts to keep with every checkpoint.
    """

    def __init__(
        self,
        model: EntropyModel | BLT,
        batches: PackedBatches,
        config: TrainConfig,
        run: Path,
        *,
        patcher: Patcher | None = None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
        notes: dict[str, Any] | None = None,
    ):
        self.model, self.batches, self.config, self.run, self.patcher = model, batches, config, Path(run), patcher
        self.evaluate, self.on_step, self.notes = evaluate, on_step, notes or {}
        self.optimizers = Optimizers(model, config.optim, config.steps)
        self.step = 0
        self.bytes_seen = 0
        self.seconds = 0.0

    def resume(self) -> bool:
        """Continues from the newest checkpoint of the run; False, and from the start, where there is none yet.

        Raises:
            CheckpointError: it is damaged, or belongs to another model or schedule.
        """
        if not list_checkpoints(self.run):
            _truncate_metrics(self.run / METRICS_FILE, 0)
            return False
        path = latest_checkpoint(self.run)
        tensors, state, step = load_checkpoint(path)
        if state["model"] != self.model.config.to_dict():
            raise CheckpointError(f"{path}: made with another model: {state['model']}")
        saved = TrainConfig(**state["train"] | {"optim": OptimConfig(**state["train"]["optim"])})
        if _comparable(saved) != _comparable(self.config):
            raise CheckpointError(f"{path}: made with another training configuration: {saved}")
        _load_weights(self.model, tensors["model"], path)
        self.optimizers.load_state_dict(tensors.get("optimizer", {}), state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        self.step, self.bytes_seen, self.seconds = step, state["bytes_seen"], state["seconds"]
        _truncate_metrics(self.run / METRICS_FILE, step)
        return True

    def train(self) -> None:
        """Trains until `config.steps`, writing metrics and checkpoints.

        Raises:
            FloatingPointError: the loss or the gradient norm is not finite; the last checkpoint stands.
            ValueError: the corpus ended before the last step.
        """
        if self.step >= self.config.steps:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        device = next(self.model.parameters()).device
        prefetch = Prefetch(self.batches, ahead=device.type != "cpu")
        self.model.train()
        try:
            with open(self.run / METRICS_FILE, "a", buffering=1) as file:
                begin = time.perf_counter()
                for batch, position in prefetch:
                    metrics = self._step(batch, begin)
                    last = self.step == self.config.steps
                    evaluate = self.evaluate is not None and (last or self.step % self.config.eval_every == 0)
                    if evaluate:
                        metrics |= self._evaluate()
                    if last or evaluate or self.step % self.config.log_every == 0:
                        file.write(json.dumps(metrics) + "\n")
                    self.on_step(metrics)
                    if last or self.step % self.config.checkpoint_every == 0:
                        self._save(position)
                    if last:
                        return
                    begin = time.perf_counter()
        finally:
            prefetch.close()
        raise ValueError(f"train: the corpus ended at step {self.step} of {self.config.steps}")

    def _step(self, batch: Batch, begin: float) -> dict[str, Any]:
        """`begin`: when the wait for the batch began, so that seconds hold what the loader cost."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.autocast):
            loss = loss_of(self.model, batch)
        loss.mean.backward()
        rate = self.optimizers.learning_rate
        norm = self.optimizers.step()
        mean, total = loss.mean.item(), loss.total.item()
        if not (math.isfinite(mean) and math.isfinite(norm.item())):
            raise FloatingPointError(f"train: step {self.step + 1}: loss {mean}, gradient norm {norm.item()}")
        seconds = time.perf_counter() - begin
        self.step += 1
        self.bytes_seen += batch.num_bytes
        self.seconds += seconds
        metrics = {
            "step": self.step,
            "bytes": self.bytes_seen,
            "seconds": round(self.seconds, 3),
            "loss": mean,
            "bits_per_byte": bits_per_byte(total, max(1, batch.num_bytes)),
            "learning_rate": rate,
            "gradient_norm": norm.item(),
            "bytes_per_second": batch.num_bytes / seconds,
        }
        if batch.patch_lengths is not None:
            metrics["bytes_per_patch"] = int(batch.seq_lens.sum()) / max(1, int((batch.patch_lengths > 0).sum()))
        return metrics

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluate is not None
        self.model.eval()
        try:
            with torch.inference_mode():
                return self.evaluate(self.model)
        finally:
            self.model.train()

    def _save(self, position: dict[str, Any]) -> None:
        optimizer_tensors, optimizer_state = self.optimizers.state_dict()
        groups = {"model": self.model.state_dict(), "optimizer": optimizer_tensors}
        patcher = None
        if self.patcher is not None:
            patcher = self.patcher.state()
            groups["entropy_model"] = self.patcher.weights()
        state = {
            "kind": "blt" if isinstance(self.model, BLT) else "entropy_model",
            "model": self.model.config.to_dict(),
            "train": dataclasses.asdict(self.config),
            "optimizer": optimizer_state,
            "batches": position,
            "patcher": patcher,
            "bytes_seen": self.bytes_seen,
            "seconds": self.seconds,
            "notes": self.notes,
        }
        save_checkpoint(self.run, self.step, groups, state)


def load_model(path: Path) -> tuple[EntropyModel | BLT, Patcher | None, dict[str, Any]]:
    """A model from a checkpoint, or from the newest one of a run, in eval mode on the CPU.

    Returns:
        The model; for a BLT the patcher it was trained with, else None; the state that was saved with them.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = latest_checkpoint(Path(path))
    tensors, state, _ = load_checkpoint(path)
    model: EntropyModel | BLT
    if state["kind"] == "blt":
        model = BLT(BLTConfig.from_dict(state["model"]))
    else:
        model = EntropyModel(EntropyModelConfig.from_dict(state["model"]))
    _load_weights(model, tensors["model"], path)
    patcher = None
    if state["patcher"] is not None:
        patcher = Patcher.from_state(state["patcher"], tensors.get("entropy_model", {}))
    return model.eval(), patcher, state


def _load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path / 'model.safetensors'}: does not fit the model: {error}") from error


def _comparable(config: TrainConfig) -> dict[str, Any]:
    """What must not change when a run is resumed: everything that decides the losses."""
    facts = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in ("log_every", "eval_every", "checkpoint_every"):
        del facts[name]
    return facts


def _truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after `step`, which training will write again, and a line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
