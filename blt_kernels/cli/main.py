"""`blt-kernels`: train, calibrate, evaluate, count FLOPs and look at patches from the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import doctor as doctor_
from .._files import naming
from .._optional import optional
from ..data import Corpus
from ..model import BLTConfig, EntropyModel, EntropyModelConfig
from ..model.flops import blt_flops, equal_token_width
from ..training.checkpoint import list_checkpoints
from ..training.evaluate import bits_per_byte, held_out_batches
from ..training.optim import OptimConfig
from ..training.patcher import Patcher, PatcherConfig
from ..training.rows import MAX_TOKENS, RowShape, patches_of_row
from ..training.runs import (
    entropy_patcher,
    new_blt,
    new_entropy_model,
    open_run,
    split,
    train_model,
    without_metrics,
)
from ..training.trainer import MAX_SEED, MAX_STEPS, TrainConfig, load_model
from .baselines import compress_bits_per_byte
from .console import console, describe, messages, say, say_warning
from .demo import run_demo
from .progress import training_progress
from .resume import TrainingCommand, run_options
from .show import print_bits, print_flops, report_left_out, report_skipped, show_patches

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Byte Latent Transformers on fused kernels: patching, training, evaluation.",
)

# The tokenizer of Llama 3, with the bytes per token that the paper measured.
LLAMA_3_VOCAB, LLAMA_3_BYTES = 128256, 4.4
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
LongestSequence = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the longest sequence, which is all that attention sees; by default an eighth of the batch.",
        min=1,
        max=MAX_TOKENS,
    ),
]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of AdamW.", callback=positive)]
Autocast = Annotated[bool, typer.Option(help="bfloat16 autocast for matrix products.")]
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
MaxPatch = Annotated[int | None, typer.Option(help="Longest patch, in bytes.", min=1, max=MAX_TOKENS)]
PatchSize = Annotated[
    float,
    typer.Option(
        help="Mean bytes per patch that the threshold is calibrated to.", min=1, max=MAX_TOKENS, callback=finite
    ),
]
BLTPreset = Annotated[str, typer.Option(help="Shape of the BLT: tiny, 400M, 1B or 7B.")]


def main() -> None:
    """What goes wrong is one line on stderr and status 1; BLT_KERNELS_DEBUG=1 shows the traceback.

    A wrong use of options is status 2, an interruption 130.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it, and wants no words
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")
    warnings.showwarning = say_warning  # type: ignore[assignment]
    status: int | str | None = None
    try:
        with naming(Path("standard output")):  # all else that is read or written has a name
            app()
    except SystemExit as done:
        status = done.code
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if os.environ.get("BLT_KERNELS_DEBUG") == "1":
            raise
        status = f"blt-kernels: {describe(error)}"
    try:
        sys.stdout.flush()
    except OSError as error:  # the disk is full, or nobody reads any more, and then there is nothing to say
        # Python flushes once more when it exits, and would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1 if isinstance(error, BrokenPipeError) else f"blt-kernels: standard output: {error.strerror}"
    sys.exit(status)


@app.command("train-entropy", cls=TrainingCommand)
def train_entropy(
    ctx: typer.Context,
    data: Data,
    run: Run,
    preset: Annotated[str, typer.Option(help="Shape of the entropy model: tiny or 100M.")] = "tiny",
    steps: Steps = 1000,
    row_tokens: RowTokens = 8192,
    longest_sequence: LongestSequence = None,
    learning_rate: LearningRate = 2e-3,
    autocast: Autocast = False,
    include: Include = None,
    exclude: Exclude = None,
    text_key: TextKey = "text",
    on_error: OnError = "raise",
    max_document_bytes: MaxDocument = 1 << 16,
    holdout_bytes: HoldOut = None,
    eval_every: EvalEvery = 500,
    checkpoint_every: CheckpointEvery = 500,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train the byte model whose entropies cut text into patches."""
    open_run(run, resume)
    shape = RowShape(row_tokens, longest_sequence or max(1, row_tokens // 8))
    model = new_entropy_model(preset, seed)
    corpus = open_corpus(data, include, exclude, text_key, on_error, max_document_bytes, run)
    train_part, held_out = split(corpus, holdout_bytes, seed)
    config = TrainConfig(
        steps, OptimConfig(learning_rate=learning_rate), autocast, 10, eval_every, checkpoint_every, seed
    )
    say_where_it_starts(run, resume)
    with training_progress(console, "entropy model", steps) as on_step:
        train_model(
            model,
            train_part,
            held_out,
            shape,
            config,
            run,
            resume=resume,
            on_step=on_step,
            notes=run_options(ctx),
        )
    report_skipped(train_part, held_out)
    say(console, f"checkpoint and metrics: {run}")


@app.command()
def calibrate(
    data: Data,
    entropy_model: Annotated[Path, typer.Option(help="Run or checkpoint of an entropy model.")],
    patch_size: PatchSize = 4.5,
    rule: Rule = "threshold",
    delta: Delta = None,
    max_patch_length: MaxPatch = None,
    include: Include = None,
    exclude: Exclude = None,
    text_key: TextKey = "text",
    on_error: OnError = "raise",
    max_document_bytes: MaxDocument = 1 << 16,
    seed: Seed = 0,
) -> None:
    """Print the entropy threshold (nats) that gives patches of a wanted mean size."""
    corpus = open_corpus(data, include, exclude, text_key, on_error, max_document_bytes)
    patcher = entropy_patcher(
        load_entropy_model(entropy_model),
        corpus,
        threshold=None,
        patch_size=patch_size,
        seed=seed,
        rule=rule,
        delta=delta,
        max_patch_length=max_patch_length,
    )
    report_skipped(corpus)
    say(console, repr(patcher.config.threshold))


@app.command(cls=TrainingCommand)
def train(
    ctx: typer.Context,
    data: Data,
    run: Run,
    entropy_model: Annotated[
        Path | None, typer.Option(help="Run or checkpoint of an entropy model; a resumed run has its own.")
    ] = None,
    preset: BLTPreset = "tiny",
    threshold: Annotated[
        str, typer.Option(help="Entropy threshold in nats, or auto: calibrate it.", callback=threshold_or_auto)
    ] = "auto",
    patch_size: PatchSize = 4.5,
    rule: Rule = "threshold",
    delta: Delta = None,
    max_patch_length: MaxPatch = None,
    steps: Steps = 1000,
    row_tokens: RowTokens = 8192,
    longest_sequence: LongestSequence = None,
    row_patches: Annotated[
        int | None,
        typer.Option(
            help="Patches of a batch, the latent transformer's length; by default as many as the tokens hold, by the "
            "mean patch of the training text.",
            min=1,
            max=MAX_TOKENS,
        ),
    ] = None,
    learning_rate: LearningRate = 2e-3,
    table_learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of the hash tables.", callback=positive)
    ] = 3e-2,
    table_optimizer: Annotated[
        str,
        typer.Option(
            help="Optimiser of the hash tables: sparse_adam (two tables of state) or rowwise_adagrad (one number of "
            "state for each row)."
        ),
    ] = "sparse_adam",
    autocast: Autocast = False,
    include: Include = None,
    exclude: Exclude = None,
    text_key: TextKey = "text",
    on_error: OnError = "raise",
    max_document_bytes: MaxDocument = 1 << 16,
    holdout_bytes: HoldOut = None,
    eval_every: EvalEvery = 500,
    checkpoint_every: CheckpointEvery = 500,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train a Byte Latent Transformer on patches from a trained entropy model."""
    open_run(run, resume)
    shape = RowShape(row_tokens, longest_sequence or max(1, row_tokens // 8), row_patches)
    optim = OptimConfig(
        learning_rate=learning_rate,
        table_optimizer=table_optimizer,
        sparse_learning_rate=table_learning_rate,
    )
    config = TrainConfig(steps, optim, autocast, 10, eval_every, checkpoint_every, seed)
    patcher = None
    if resume and list_checkpoints(run):
        _, patcher, state = load_model(run)
        shape = rows_of(run, state)
    elif entropy_model is None:
        raise ValueError("train: --entropy-model: expected a run or checkpoint, got none")
    corpus = open_corpus(data, include, exclude, text_key, on_error, max_document_bytes, run)
    train_part, held_out = split(corpus, holdout_bytes, seed)
    if patcher is None:
        assert entropy_model is not None
        patcher = entropy_patcher(
            load_entropy_model(entropy_model),
            train_part,
            threshold=None if threshold == "auto" else float(threshold),
            patch_size=patch_size,
            seed=seed,
            rule=rule,
            delta=delta,
            max_patch_length=max_patch_length,
        )
        if row_patches is None:
            shape = dataclasses.replace(shape, row_patches=patches_of_row(row_tokens, train_part, patcher))
    say_where_it_starts(run, resume)
    say(console, f"threshold {patcher.config.threshold:.6f} nats, {shape.row_patches} patches a batch")
    with training_progress(console, "BLT", steps) as on_step:
        train_model(
            new_blt(preset, seed),
            train_part,
            held_out,
            shape,
            config,
            run,
            patcher=patcher,
            resume=resume,
            on_step=on_step,
            notes=run_options(ctx),
        )
    report_skipped(train_part, held_out)
    say(console, f"checkpoint and metrics: {run}")


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Run or checkpoint of a BLT or an entropy model.")],
    data: Data,
    include: Include = None,
    exclude: Exclude = None,
    text_key: TextKey = "text",
    on_error: OnError = "raise",
    max_document_bytes: MaxDocument = 1 << 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Bits per byte on text, beside what gzip, xz, zstd and PPMd reach on the same bytes."""
    corpus = open_corpus(data, include, exclude, text_key, on_error, max_document_bytes)
    loaded, patcher, state = load_model(model)
    shape = rows_of(model, state)
    bits, num_bytes = bits_per_byte(loaded, held_out_batches(corpus, shape, patcher))
    rows = {type(loaded).__name__: bits} | compress_bits_per_byte(corpus)
    report_skipped(corpus)
    if as_json:
        typer.echo(json.dumps({"bytes": num_bytes, "bits_per_byte": rows}))
        return
    print_bits(console, f"bits per byte of {num_bytes:,} bytes", rows)


@app.command()
def patch(
    model: Annotated[Path, typer.Option(help="Run or checkpoint of a BLT or an entropy model.")],
    text: Annotated[str | None, typer.Argument(help="The text itself.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the text from a file instead.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Entropy threshold in nats; by default the one the BLT was trained with.", callback=finite),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write the entropy curve with the patches to this PNG.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the coloured patches to this HTML page.")] = None,
) -> None:
    """Show the patches of a text, coloured, with their entropies."""
    if text is not None and file is None:
        data = os.fsencode(text)  # the bytes that were typed, also where they are no valid text
    elif file is not None and text is None:
        with naming(file):
            data = file.read_bytes()
    else:
        raise ValueError("patch: expected a text or --file, got " + ("neither" if text is None else "both"))
    for option, path in (("--png", png), ("--html", html)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"patch: {option}: expected a file in a directory that exists, got {path}")
    if png is not None:
        optional("matplotlib")  # if it is missing, that is said before the model has read the text
    loaded, patcher, _ = load_model(model)
    if isinstance(loaded, EntropyModel):
        if threshold is None:
            raise ValueError("patch: --threshold: expected a number for an entropy model, which has none of its own")
        patcher = Patcher(PatcherConfig(threshold=threshold), loaded)
    elif patcher is None:
        raise ValueError(f"patch: --model: expected a model with a patcher, got {model}")
    elif threshold is not None:
        if patcher.entropy_model is None:
            raise ValueError(
                "patch: --threshold: this BLT was trained without an entropy model, so it has no threshold"
            )
        patcher = Patcher(dataclasses.replace(patcher.config, threshold=threshold), patcher.entropy_model)
    show_patches(console, patcher, data, png=png, html=html)


@app.command()
def flops(
    preset: BLTPreset = "1B",
    patch_size: Annotated[float, typer.Option(help="Mean bytes per patch.", min=1, callback=finite)] = 4.5,
    context: Annotated[int, typer.Option(help="Bytes of a sequence.", min=1, max=MAX_BYTES)] = 8192,
    entropy_preset: Annotated[str, typer.Option(help="Shape of the entropy model: tiny or 100M.")] = "100M",
) -> None:
    """FLOPs per byte of a BLT, by component: as the paper counts them, and with what it leaves out."""
    config = BLTConfig.preset(preset)
    paper, inclusive = (
        blt_flops(
            config,
            patch_size,
            context_bytes=context,
            entropy_model=EntropyModelConfig.preset(entropy_preset),
            count=count,
        )
        for count in ("paper", "inclusive")
    )
    print_flops(console, f"{preset}, patches of {patch_size:g} bytes, sequences of {context:,}", paper, inclusive)
    layers = config.latent.num_layers
    widths = [
        f"{equal_token_width(ledger.forward, layers, LLAMA_3_VOCAB, LLAMA_3_BYTES, context_bytes=context):,.0f}"
        for ledger in (paper, inclusive)
    ]
    say(
        console,
        f"A transformer of {layers} layers over Llama 3's tokens ({LLAMA_3_BYTES} bytes each) has the same FLOPs per "
        f"byte at width {widths[0]} (paper) or {widths[1]} (inclusive).",
    )


@app.command()
def doctor() -> None:
    """Say what was built, what is here, and what is missing."""
    typer.echo(doctor_.report())


@app.command()
def demo(
    run: Run = Path("runs/demo"),
    data: Annotated[
        list[Path] | None, typer.Option(help="Your own text; by default the source of Python's standard library.")
    ] = None,
    minutes: Annotated[
        float,
        typer.Option(help="Time for all of it on an idle machine, roughly.", max=10080, callback=positive),
    ] = 3.6,
    seed: Seed = 0,
) -> None:
    """Train an entropy model and a small BLT on real text, and compare it with gzip, xz, zstd and PPMd."""
    run_demo(console, run, data, minutes, seed)


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


def load_entropy_model(path: Path) -> EntropyModel:
    model, _, _ = load_model(path)
    if not isinstance(model, EntropyModel):
        raise ValueError(f"{path}: expected an entropy model, got a {type(model).__name__}")
    return model


def rows_of(path: Path, state: dict[str, Any]) -> RowShape:
    """The shape of the rows that a model was trained on."""
    try:
        return RowShape(**state["notes"]["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its checkpoint does not say in rows of which shape it was trained") from error


def say_where_it_starts(run: Path, resume: bool) -> None:
    if resume and not list_checkpoints(run):
        say(messages, f"{run}: no checkpoint yet: training starts at the first step")
