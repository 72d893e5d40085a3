"""Options that several commands have in common."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ..training.rows import MAX_TOKENS
from ..training.trainer import MAX_SEED, MAX_STEPS

MAX_BYTES = 1 << 40


def finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def positive(value: float) -> float:
    if not value > 0:
        raise typer.BadParameter(f"{value} is not above 0.")
    finite(value)
    return value


def threshold_or_auto(value: str) -> str:
    """ "auto", or the number in one spelling, so that --resume finds 1 and 1.0 equal."""
    if value == "auto":
        return value
    try:
        number = float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a number of nats nor auto.") from None
    finite(number)
    return str(number)


Data = Annotated[
    list[Path],
    typer.Argument(help="Text files, JSON lines (.jsonl, also .gz, .xz, .zst), Parquet files, or directories of them."),
]
Run = Annotated[Path, typer.Option(help="Directory of the run: metrics.jsonl and checkpoints.")]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of the files that directories contribute, such as '*.py'. May be given several times."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        help="Pattern of files or directories to leave out, relative to the directory, as in .gitignore: 'test/', "
        "'test/*', 'a/b.txt'. May be given several times."
    ),
]
TextKey = Annotated[str, typer.Option(help="Key of JSON records, or Parquet column, that holds the text.")]
OnError = Annotated[str, typer.Option(help="What to do with a corrupt record or file: raise, or skip and count it.")]
MaxDocument = Annotated[
    int, typer.Option(help="Longer documents are cut into pieces of at most this many bytes.", min=4, max=MAX_BYTES)
]
HoldOut = Annotated[
    int | None,
    typer.Option(
        help="Bytes to hold out of training, at least; by default 1 MiB or a tenth of the data.", min=1, max=MAX_BYTES
    ),
]
Steps = Annotated[int, typer.Option(help="Optimiser steps in all.", min=1, max=MAX_STEPS)]
RowTokens = Annotated[
    int,
    typer.Option(help="Tokens of a batch: one row, packed with sequences of many documents.", min=1, max=MAX_TOKENS),
]
Lanes = Annotated[
    int,
    typer.Option(
        help="Batches of a step, each from documents of its own. Their gradients are accumulated, or divided among the "
        "processes of torchrun, whose number must divide this one.",
        min=1,
        max=MAX_STEPS,
    ),
]
LongestSequence = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the longest sequence, which is all that attention sees; by default an eighth of the batch.",
        min=1,
        max=MAX_TOKENS,
    ),
]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of AdamW.", callback=positive)]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:i, or auto, which is a GPU if the kernels run on one and the CPU "
        "otherwise. Under torchrun, cuda and auto give each process a GPU of its own."
    ),
]
LatentLrScale = Annotated[
    float,
    typer.Option(
        help="The layers of the latent transformer learn at this multiple of the learning rate.", callback=positive
    ),
]
TableLearningRate = Annotated[float, typer.Option(help="Peak learning rate of the hash tables.", callback=positive)]
TableOptimizer = Annotated[
    str,
    typer.Option(
        help="Optimiser of the hash tables: rowwise_adagrad (one number of state for each row) or sparse_adam (two "
        "tables of state)."
    ),
]
Autocast = Annotated[
    bool,
    typer.Option(
        help="bfloat16 autocast for matrix products. On a GPU, attention over patches has a fast kernel with it alone."
    ),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="torch.compile of the forward pass, in the first step, which takes minutes then."),
]
CheckpointActivations = Annotated[
    bool,
    typer.Option(
        "--checkpoint-activations",
        help="Layers keep their inputs alone for backward, which computes the rest again: several times less memory "
        "for a third more FLOPs.",
    ),
]
EvalEvery = Annotated[int, typer.Option(help="Steps between evaluations of held-out text.", min=1, max=MAX_STEPS)]
CheckpointEvery = Annotated[int, typer.Option(help="Steps between checkpoints.", min=1, max=MAX_STEPS)]
Seed = Annotated[
    int,
    typer.Option(
        help="Of the initial weights, the order of documents and the held-out split.", min=-MAX_SEED - 1, max=MAX_SEED
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the run from its newest checkpoint, with its settings; start it where there is none yet.",
    ),
]
Rule = Annotated[str, typer.Option(help="Where a patch starts: threshold, monotonic or combined.")]
Delta = Annotated[float | None, typer.Option(help="Entropy difference (nats) of the combined rule.", callback=finite)]
ResetAtNewline = Annotated[
    bool, typer.Option("--reset-at-newline", help="The entropy model forgets what it has read at the end of each line.")
]
MaxPatch = Annotated[int | None, typer.Option(help="Longest patch, in bytes.", min=1, max=MAX_TOKENS)]
PatchSize = Annotated[
    float,
    typer.Option(
        help="Mean bytes per patch that the threshold is calibrated to, on text that no model has read. With "
        "--patching fixed: the bytes of each patch.",
        min=1,
        max=MAX_TOKENS,
        callback=finite,
    ),
]
BLTPreset = Annotated[str, typer.Option(help="Shape of the BLT: tiny, 400M, 1B or 7B.")]
