"""Whole training runs: what the CLI and the demo do, as functions."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .._optional import optional
from ..data import Batch, Corpus, split_corpus
from ..model import BLT, BLTConfig, EntropyModel, EntropyModelConfig
from .calibration import set_apart
from .checkpoint import list_checkpoints
from .evaluate import held_out_batches, watch
from .lanes import Lanes
from .load import model_like
from .patcher import Patcher
from .ranks import from_first, lanes_of_rank, world_size
from .rows import RowShape
from .trainer import METRICS_FILE, TrainConfig, Trainer

# Held-out bytes that are evaluated while training goes on; the whole held-out text is evaluated by `eval`.
WATCHED_BYTES = 1 << 16
# Of texts for runs of minutes. What a loader has open is cut into patches whole, and at the end of a run most of it was
# cut for nothing; these pieces are still many times as long as a sequence.
DOCUMENT_BYTES = 1 << 14


def open_run(run: Path, resume: bool) -> None:
    """Refuses a directory that cannot hold a run, and a new run over an old one.

    With `resume` a run may have a checkpoint or not. Without one there is nothing to lose, and the run starts anew:
    it was stopped before its first checkpoint was whole, or it never began.

    Raises:
        ValueError: there is a run here already, and `resume` is not set.
        OSError: a file is in the way, or the directory may not be written.
    """
    existing = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is in the way of the directory of the run", str(existing))
    if not os.access(existing, os.W_OK):
        raise PermissionError(errno.EACCES, "no permission to write the run here", str(existing))
    metrics = run / METRICS_FILE
    if not resume and (list_checkpoints(run) or (metrics.exists() and metrics.stat().st_size > 0)):
        raise ValueError(f"{run}: there is a run here already; continue it with --resume, or choose another --run")


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Makes the directory of a run and keeps other processes from training in it meanwhile.

    The lock is gone when the process is, however that ends. A directory that was made here and stays empty is removed.

    Raises:
        ValueError: another process trains in `run`.
    """
    is_new = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run}: another process is training this run; choose another --run") from None
        except OSError:
            pass  # some network file systems cannot lock a directory
        try:
            yield
        finally:
            if is_new:
                with contextlib.suppress(OSError):  # it holds something
                    run.rmdir()
    finally:
        os.close(descriptor)


def train_model(
    model: EntropyModel | BLT,
    train: Corpus,
    held_out: Corpus | None,
    shape: RowShape,
    config: TrainConfig,
    run: Path,
    *,
    patcher: Patcher | None = None,
    resume: bool = False,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
    notes: dict[str, Any] | None = None,
) -> Trainer:
    """Trains `model` on `train` as `config` says, watching bits per byte on the beginning of `held_out`.

    It trains on the device of the model. On many ranks (see `ranks.joined`) all call it together, with equal
    arguments, and the model is divided among them. The patcher cuts documents on the device of its entropy model.

    With `resume` it goes on from the newest checkpoint of `run`, and starts anew where there is none; see `open_run`.
    """
    optional("safetensors.torch")  # if it is missing, that is said now and not at the first checkpoint
    mine = lanes_of_rank(config.lanes)
    with contextlib.ExitStack() as stack:
        from_first(lambda: _take(run, resume, stack))
        order = entropy_order(config.seed) if isinstance(model, EntropyModel) else config.seed
        lanes = Lanes.over(train, shape, patcher, seed=order, num_lanes=config.lanes, mine=mine)
        watched = from_first(lambda: _watched(held_out, shape, patcher))
        sharding = None
        if world_size() > 1:
            from .sharding import Sharding  # it takes seconds to import

            sharding = Sharding(model, next(model.parameters()).device, autocast=config.autocast)
        trainer = Trainer(
            model,
            lanes,
            config,
            run,
            patcher=patcher,
            evaluate=watch(watched) if watched else None,
            on_step=on_step,
            notes={"rows": dataclasses.asdict(shape), **(notes or {})},
            sharding=sharding,
        )
        if resume:
            trainer.resume()
        trainer.train()
    return trainer


def _take(run: Path, resume: bool, stack: contextlib.ExitStack) -> None:
    """Takes the directory of a run until `stack` is closed."""
    open_run(run, resume)
    stack.enter_context(_locked(run))
    open_run(run, resume)  # again: another process may have trained here just before


def _watched(held_out: Corpus | None, shape: RowShape, patcher: Patcher | None) -> list[Batch]:
    return [] if held_out is None else list(held_out_batches(held_out, shape, patcher, max_bytes=WATCHED_BYTES))


def entropy_order(seed: int) -> int:
    """The seed of the order in which an entropy model reads documents; a BLT reads in the order of `seed` itself.

    In one order a BLT would begin with the documents that its entropy model has read and partly remembers. Their
    patches are longer than those of other text: rows would have unused patches, and the BLT would learn from patches
    that it does not meet again.
    """
    return ~seed


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In the block the random numbers of torch on the CPU depend on `seed` alone; outside of it nothing changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def new_entropy_model(preset: str, seed: int, device: str | torch.device = "cpu") -> EntropyModel:
    """An untrained entropy model on `device`, with weights that depend on `seed` alone."""
    with seeded(seed):
        return EntropyModel(EntropyModelConfig.preset(preset)).to(device)


def new_blt(preset: str, seed: int, device: str | torch.device = "cpu") -> BLT:
    """An untrained BLT on `device`, with weights that depend on `seed` alone."""
    with seeded(seed):
        return BLT(BLTConfig.preset(preset)).to(device)


def empty_model(state: dict[str, Any], device: torch.device) -> EntropyModel | BLT:
    """A model of the shape in the state of a checkpoint, whose weights are still to be read."""
    with torch.device("meta"):
        model = model_like(state)
    return model.to_empty(device=device)


def split(corpus: Corpus, holdout_bytes: int | None, seed: int) -> tuple[Corpus, Corpus, Corpus]:
    """(training, calibration, held-out).

    The calibration text is the same for every seed and size of the held-out text, see `set_apart`. No model is trained
    on it, neither the entropy model nor, to keep one division for both, the BLT.

    Args:
        holdout_bytes: to hold out, at least; by default 1 MiB, or a tenth of the files where that is less.
    """
    if holdout_bytes is None:
        holdout_bytes = max(1, min(1 << 20, sum(file.size for file in corpus.files) // 10))
    rest, calibration = set_apart(corpus)
    train, held_out = split_corpus(rest, holdout_bytes, seed=seed)
    return train, calibration, held_out


def without_metrics(corpus: Corpus, given: Sequence[Path], run: Path | None) -> Corpus:
    """`corpus` without the metrics of runs whose directories lie in the text; `left_out` counts them.

    Their lines are no text, and if they were, no run could be resumed on text that it has changed itself.

    Args:
        given: the paths that `corpus` was made of; a file among them is read as it is.
        run: the run, or the directory of runs, that is to be trained; others are known by their checkpoints.
    """
    kept = []
    for file in corpus.files:
        folder = file.path.resolve().parent if file.path.name == METRICS_FILE else None
        is_own = folder is not None and run is not None and run.resolve() in (folder, *folder.parents)
        if folder is not None and file.path not in given and (is_own or list_checkpoints(folder)):
            corpus.left_out.add("metrics of a run", file.name)
        else:
            kept.append(file)
    return corpus.with_files(kept)


def standard_library() -> Corpus:
    """The source of Python's own standard library: real text that every machine has.

    Without the tests, which not every distribution ships (and some of which are broken on purpose), and without the
    generated tables of `encodings` and `pydoc_data`.
    """
    left_out = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings", "pydoc_data")
    return Corpus(
        sysconfig.get_paths()["stdlib"],
        include="*.py",
        exclude=tuple(f"*/{name}/*" for name in left_out),
        on_error="skip",
        max_document_bytes=DOCUMENT_BYTES,
    )
