"""The training loop, for the entropy model and for BLT: exact resume, atomic checkpoints, metrics as JSON lines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._checks import check_bool, check_int, fail_type
from .._files import atomic_path, naming
from ..data import Batch, CorpusError
from ..model import BLT, EntropyModel
from ..model.loss import bits_per_byte
from .checkpoint import (
    STATE_FILE,
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    reading,
    remove_partial,
    save_checkpoint,
)
from .execution import prepare
from .lanes import Lanes
from .load import load_weights
from .metrics import StepMeter
from .optim import OptimConfig, Optimizers
from .patcher import Patcher
from .prefetch import prefetch
from .ranks import from_all, from_first, is_first, lanes_of_rank, sum_over_ranks
from .step import training_step

if TYPE_CHECKING:
    from .sharding import Sharding

METRICS_FILE = "metrics.jsonl"
MAX_STEPS = 99_999_999  # the name of a checkpoint has eight digits
MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to write on the way.

    Attributes:
        steps: optimiser steps in all, 1 .. 99999999.
        optim: see OptimConfig.
        autocast: bfloat16 autocast for matrix products; parameters, losses and entropies stay float32.
        log_every: steps between lines of metrics.
        eval_every: steps between evaluations of the held-out text (and one at the end).
        checkpoint_every: steps between checkpoints (and one at the end).
        seed: of the initial weights and the order of documents, an int64.
        lanes: G, batches of a step, each of a loader of its own; see Lanes. The mean loss is over all of them.
        compile: the forward pass is compiled to one graph, in the first step.
        checkpoint_activations: layers keep their inputs alone for backward, which computes the rest again.
    """

    steps: int
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    autocast: bool = False
    log_every: int = 10
    eval_every: int = 500
    checkpoint_every: int = 500
    seed: int = 0
    lanes: int = 1
    compile: bool = False
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        check_int("TrainConfig", "steps", self.steps, 1, MAX_STEPS)
        for name in ("log_every", "eval_every", "checkpoint_every", "lanes"):
            check_int("TrainConfig", name, getattr(self, name), 1)
        check_int("TrainConfig", "seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if not isinstance(self.optim, OptimConfig):
            raise fail_type("TrainConfig", "optim", "an OptimConfig", type(self.optim).__name__)
        for name in ("autocast", "compile", "checkpoint_activations"):
            check_bool("TrainConfig", name, getattr(self, name))


class Trainer:
    """Trains a model on batches, from the start or from the newest checkpoint of its run.

    Args:
        model: an EntropyModel or a BLT.
        lanes: the loaders of the lanes, as many as `config` says; their states go into every checkpoint.
        config: see TrainConfig.
        run: directory for `metrics.jsonl` and checkpoints.
        patcher: saved with a BLT, so that a checkpoint is all that evaluation needs.
        evaluate: called with the model, on all ranks; returns figures for the metrics, such as held-out bits per byte.
        on_step: called with each line of metrics (a progress bar), on rank 0.
        notes: JSON-able facts to keep with every checkpoint.
        sharding: how the model is divided among ranks; None: this process has all of it.
    """

    def __init__(
        self,
        model: EntropyModel | BLT,
        lanes: Lanes,
        config: TrainConfig,
        run: Path,
        *,
        patcher: Patcher | None = None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
        notes: dict[str, Any] | None = None,
        sharding: Sharding | None = None,
    ):
        self.model, self.lanes, self.config, self.run, self.patcher = model, lanes, config, Path(run), patcher
        self.evaluate, self.on_step, self.notes = evaluate, on_step, notes or {}
        self.sharding = sharding
        prepare(model, compiled=config.compile, checkpointed=config.checkpoint_activations)
        self.meter = StepMeter(model, patcher, next(model.parameters()).device)
        self.optimizers = Optimizers(model, config.optim, config.steps, sharding)
        self._parameters = dict(model.named_parameters())
        self.step = 0
        self.bytes_seen = 0
        self.seconds = 0.0

    def resume(self) -> bool:
        """Continues from the newest checkpoint of the run; False, and from the start, where there is none yet.

        The checkpoint may be of any number of ranks.

        Raises:
            CheckpointError: it is damaged, or was made with another model, other settings or other text; names each
                setting that differs.
        """
        path = from_first(self._newest)
        if path is None:
            return False
        tensors, state, step = load_checkpoint(path, read=None if self.sharding is None else self._read)
        with reading(path / STATE_FILE, passing=(CorpusError,)):
            _refuse_changes(path, "model", state["model"], self.model.config.to_dict())
            _refuse_changes(path, "training", _decisive(state["train"]), _decisive(dataclasses.asdict(self.config)))
            states = state["lanes"]
            _refuse_changes(path, "row", states[0]["settings"], self.lanes.state_dict()[0]["settings"])
            corpus = self.lanes.loaders[0].documents.corpus
            if states[0]["documents"]["corpus"] != corpus.fingerprint():
                raise CheckpointError(
                    f"{path}: the run was trained on other text than {corpus.origin}: the files, their sizes, the part "
                    "that is held out or the way they are read differ"
                )
            load_weights(self.model, tensors["model"], path)
            self.optimizers.load_state_dict(tensors.get("optimizer", {}), state["optimizer"])
            self.lanes.load_state_dict([states[lane] for lane in lanes_of_rank(self.config.lanes)])
            self.step, self.bytes_seen, self.seconds = step, state["bytes_seen"], state["seconds"]
        from_first(lambda: _truncate_metrics(self.run / METRICS_FILE, step))
        return True

    def _newest(self) -> Path | None:
        """The newest checkpoint of the run, or None. What was written without one is dropped."""
        remove_partial(self.run)
        if list_checkpoints(self.run):
            return latest_checkpoint(self.run)
        _truncate_metrics(self.run / METRICS_FILE, 0)
        return None

    def _read(self, file: Path) -> dict[str, torch.Tensor]:
        """This rank's part of the tensors in a file of a checkpoint."""
        assert self.sharding is not None
        owners: dict[str, Callable[[str], nn.Parameter | None]]
        owners = {"model": self._parameters.get, "optimizer": self.optimizers.owner}
        return self.sharding.read(file, owners.get(file.stem, lambda name: None))

    def train(self) -> None:
        """Trains until `config.steps`, writing metrics and checkpoints.

        Raises:
            FloatingPointError: the loss or the gradient norm is not finite; the last checkpoint stands.
            ValueError: the corpus ended before the last step.
        """
        if self.step >= self.config.steps:
            return
        if is_first():
            self.run.mkdir(parents=True, exist_ok=True)
        device = next(self.model.parameters()).device
        self.model.train()
        with contextlib.closing(prefetch(self.lanes, ahead=device.type != "cpu", device=device)) as steps:
            begin = time.perf_counter()
            for batches, position in steps:
                metrics = self._step(batches, begin)
                last = self.step == self.config.steps
                evaluate = self.evaluate is not None and (last or self.step % self.config.eval_every == 0)
                if evaluate:
                    metrics |= self._evaluate()
                if is_first():
                    if last or evaluate or self.step % self.config.log_every == 0:
                        self._log(metrics)
                    self.on_step(metrics)
                if last or self.step % self.config.checkpoint_every == 0:
                    self._save(position)
                if last:
                    return
                begin = time.perf_counter()
        raise ValueError(f"train: the corpus ended at step {self.step} of {self.config.steps}")

    def _step(self, batches: list[Batch], begin: float) -> dict[str, Any]:
        """`begin`: when the wait for the batches began, so that seconds hold what the loader cost."""
        rate = self.optimizers.learning_rate
        loss, norm = training_step(self.model, batches, self.optimizers, autocast=self.config.autocast)
        mean = loss.mean.item()
        if not (math.isfinite(mean) and math.isfinite(norm.item())):
            raise FloatingPointError(
                f"train: step {self.step + 1}: expected a finite loss and gradient norm, got {mean} and {norm.item()}; "
                "a lower learning rate may help"
            )
        num_bytes, num_tokens, num_patches = sum_over_ranks(
            [sum(getattr(batch, name) for batch in batches) for name in ("num_bytes", "num_tokens", "num_patches")]
        )
        seconds = time.perf_counter() - begin
        self.step += 1
        self.bytes_seen += num_bytes
        self.seconds += seconds
        metrics = {
            "step": self.step,
            "bytes": self.bytes_seen,
            "seconds": round(self.seconds, 3),
            "loss": mean,
            "bits_per_byte": bits_per_byte(loss.text_total.item(), max(1, num_bytes)),
            "learning_rate": rate,
            "gradient_norm": norm.item(),
        }
        return metrics | self.meter.measure(batches, num_bytes, num_tokens, num_patches, seconds)

    def _log(self, metrics: dict[str, Any]) -> None:
        path = self.run / METRICS_FILE
        with naming(path), open(path, "a") as file:
            file.write(json.dumps(metrics) + "\n")

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluate is not None
        self.model.eval()
        try:
            with torch.no_grad():  # inference mode would leave FSDP tensors that cannot be trained with
                return self.evaluate(self.model)
        finally:
            self.model.train()

    def _save(self, position: list[dict[str, Any]]) -> None:
        model_tensors = self.model.state_dict()
        optimizer_tensors, optimizer_state = self.optimizers.state_dict()
        if self.sharding is not None:
            model_tensors = {
                name: self.sharding.to_save(self._parameters[name], tensor) for name, tensor in model_tensors.items()
            }
            optimizer_tensors = {
                name: self.sharding.to_save(self.optimizers.owner(name), tensor)
                for name, tensor in optimizer_tensors.items()
            }
        groups = {"model": model_tensors, "optimizer": optimizer_tensors}
        patcher = None
        if self.patcher is not None:
            patcher = self.patcher.state()
            groups["entropy_model"] = self.patcher.weights()
        state = {
            "kind": "blt" if isinstance(self.model, BLT) else "entropy_model",
            "model": self.model.config.to_dict(),
            "train": dataclasses.asdict(self.config),
            "optimizer": optimizer_state,
            "lanes": [state for states in from_all(position) for state in states],
            "patcher": patcher,
            "bytes_seen": self.bytes_seen,
            "seconds": self.seconds,
            "notes": self.notes,
        }
        save_checkpoint(self.run, self.step, groups, state)


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """What must not change when a run is resumed: everything that decides the losses, but for their rounding."""
    free = ("log_every", "eval_every", "checkpoint_every", "compile", "checkpoint_activations")
    return {name: value for name, value in config.items() if name not in free}


def _refuse_changes(path: Path, what: str, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises CheckpointError with every setting of `what` that a resumed run would change."""
    before, after = _flat(saved), _flat(json.loads(json.dumps(now)))
    changed = [
        f"{name}: the run has {before.get(name, 'none')}, got {after.get(name, 'none')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if changed:
        raise CheckpointError(f"{path}: made with other {what} settings: {'; '.join(changed)}")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"eps": 1}} as {"optim.eps": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after `step`, which training will write again, and lines that are damaged or cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            wanted = line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if wanted:
            kept.append(line)
    with atomic_path(path) as partial:
        partial.write_bytes(b"".join(kept))
