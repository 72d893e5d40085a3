"""What commands read before they compute: text, models, the shape of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoints import load_any
from ..checkpoints.source import is_published
from ..data import Corpus
from ..model import BLT, EntropyModel
from ..training.checkpoint import list_checkpoints
from ..training.load import load_model
from ..training.patcher import Patcher
from ..training.rows import RowShape, patches_of_row
from ..training.runs import without_metrics
from .console import messages, say
from .show import report_left_out

# Of models that come without a training run: what published ones were trained on, two at a time.
LONGEST_SEQUENCE = 8192
ROW_TOKENS = 2 * LONGEST_SEQUENCE


def open_corpus(
    data: list[Path],
    include: list[str] | None,
    exclude: list[str] | None,
    text_key: str,
    on_error: str,
    max_document_bytes: int,
    run: Path | None = None,
) -> Corpus:
    """The corpus that the options describe, without what runs have written there (`run`: also before its first
    checkpoint). What it leaves out, and patterns that match nothing, are said on stderr."""
    patterns: dict[str, Any] = {} if include is None else {"include": include}
    corpus = Corpus(
        data,
        text_key=text_key,
        on_error=on_error,
        exclude=exclude or (),
        max_document_bytes=max_document_bytes,
        **patterns,
    )
    corpus = without_metrics(corpus, data, run)
    report_left_out(corpus)
    return corpus


def load_entropy_model(path: Path, device: torch.device) -> EntropyModel:
    model, _, _ = load_model(path, device)
    if not isinstance(model, EntropyModel):
        raise ValueError(f"{path}: expected an entropy model, got a {type(model).__name__}")
    return model


def load_trained(
    path: Path, device: torch.device, corpus: Corpus
) -> tuple[EntropyModel | BLT, Patcher | None, RowShape]:
    """A model, its patcher, and the shape of rows in which it reads `corpus`: that of its training if it is known."""
    if not is_published(path):
        model, patcher, state = load_model(path, device)
        return model, patcher, rows_of(path, state)
    model, patcher = load_any(path, dtype=torch.float32, device=device)
    if patcher is None:
        raise ValueError(f"{path}: expected a model with a patcher, got one without")
    return model, patcher, RowShape(ROW_TOKENS, LONGEST_SEQUENCE, patches_of_row(ROW_TOKENS, corpus, patcher))


def rows_of(path: Path, state: dict[str, Any]) -> RowShape:
    """The shape of the rows that a model was trained on."""
    try:
        return RowShape(**state["notes"]["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its checkpoint does not say in rows of which shape it was trained") from error


def say_where_it_starts(run: Path, resume: bool, device: torch.device) -> None:
    if resume and not list_checkpoints(run):
        say(messages, f"{run}: no checkpoint yet: training starts at the first step")
    if device.type != "cpu":
        say(messages, f"{run}: training on {device}")
