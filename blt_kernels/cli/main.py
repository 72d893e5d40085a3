"""`blt-kernels`: train, calibrate, evaluate, count FLOPs and look at patches from the command line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
except ImportError:
    sys.exit("blt-kernels: the command line needs more packages: pip install 'blt_kernels[train]'")

from .. import doctor as doctor_
from ..data import Corpus
from ..model import BLTConfig, EntropyModel, EntropyModelConfig
from ..model.flops import blt_flops, equal_token_width
from ..training.evaluate import bits_per_byte, held_out_batches
from ..training.optim import OptimConfig
from ..training.patcher import Patcher, PatcherConfig
from ..training.rows import RowShape
from ..training.runs import entropy_patcher, new_blt, new_entropy_model, row_tokens_for, split, train_model
from ..training.trainer import TrainConfig, load_model
from .baselines import compress_bits_per_byte
from .demo import run_demo
from .progress import training_progress
from .show import print_bits, print_flops, show_patches

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Byte Latent Transformers on fused kernels: patching, training, evaluation.",
)
console = Console(highlight=False)

# The tokenizer of Llama 3, with the bytes per token that the paper measured.
LLAMA_3_VOCAB, LLAMA_3_BYTES = 128256, 4.4

Data = Annotated[
    list[Path],
    typer.Argument(help="Text files, JSON lines (.jsonl, also .gz, .xz, .zst), Parquet files, or directories of them."),
]
Run = Annotated[Path, typer.Option(help="Directory of the run: metrics.jsonl and checkpoints.")]
Include = Annotated[list[str] | None, typer.Option(help="Patterns of the files that directories contribute: '*.py'.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Patterns of files to leave out.")]
TextKey = Annotated[str, typer.Option(help="Key of JSON records, or Parquet column, that holds the text.")]
OnError = Annotated[str, typer.Option(help="What to do with a corrupt record or file: raise, or skip and count it.")]
MaxDocument = Annotated[int, typer.Option(help="Longer documents are cut into pieces of at most this many bytes.")]
HoldOut = Annotated[
    int | None, typer.Option(help="Bytes to hold out of training, at least; by default 1 MiB or a tenth of the data.")
]
Steps = Annotated[int, typer.Option(help="Optimiser steps in all.")]
BatchSize = Annotated[int, typer.Option(help="Rows of a batch. With 1, a row holds several documents.")]
RowTokens = Annotated[int, typer.Option(help="Tokens of a row, at most.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of AdamW.")]
Autocast = Annotated[bool, typer.Option(help="bfloat16 autocast for matrix products.")]
EvalEvery = Annotated[int, typer.Option(help="Steps between evaluations of held-out text.")]
CheckpointEvery = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Seed = Annotated[int, typer.Option(help="Of the initial weights, the order of documents and the held-out split.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")]
Rule = Annotated[str, typer.Option(help="Where a patch starts: threshold, monotonic or combined.")]
Delta = Annotated[float | None, typer.Option(help="Entropy difference (nats) of the combined rule.")]
MaxPatch = Annotated[int | None, typer.Option(help="Longest patch, in bytes.")]
PatchSize = Annotated[float, typer.Option(help="Mean bytes per patch that the threshold is calibrated to.")]


def main() -> None:
    """Entry point: what the user can mend is one line on stderr; BLT_KERNELS_DEBUG=1 shows the traceback."""
    try:
        app()
    except (ValueError, TypeError, ImportError, FloatingPointError, OSError, RuntimeError) as error:
        if os.environ.get("BLT_KERNELS_DEBUG") == "1":
            raise
        sys.exit(f"blt-kernels: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


@app.command("train-entropy")
def train_entropy(
    data: Data,
    run: Run,
    preset: Annotated[str, typer.Option(help="Shape of the entropy model: tiny or 100M.")] = "tiny",
    steps: Steps = 1000,
    batch_size: BatchSize = 8,
    row_tokens: RowTokens = 1024,
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
    corpus = open_corpus(data, include, exclude, text_key, on_error, max_document_bytes)
    train_part, held_out = split(corpus, holdout_bytes, seed)
    config = TrainConfig(
        steps, OptimConfig(learning_rate=learning_rate), autocast, 10, eval_every, checkpoint_every, seed
    )
    with training_progress(console, "entropy model", steps) as on_step:
        train_model(
            new_entropy_model(preset, seed),
            train_part,
            held_out,
            RowShape(batch_size, row_tokens),
            config,
            run,
            resume=resume,
            on_step=on_step,
            notes={"data": [str(path) for path in data], "holdout_bytes": holdout_bytes},
        )
    report_skipped(train_part, held_out)
    console.print(f"checkpoint and metrics: {run}")


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
    console.print(f"{patcher.config.threshold!r}")


@app.command()
def train(
    data: Data,
    run: Run,
    entropy_model: Annotated[
        Path | None, typer.Option(help="Run or checkpoint of an entropy model; a resumed run has its own.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Shape of the BLT: tiny, 400M, 1B or 7B.")] = "tiny",
    threshold: Annotated[str, typer.Option(help="Entropy threshold in nats, or auto: calibrate it.")] = "auto",
    patch_size: PatchSize = 4.5,
    rule: Rule = "threshold",
    delta: Delta = None,
    max_patch_length: MaxPatch = None,
    steps: Steps = 1000,
    batch_size: BatchSize = 8,
    row_patches: Annotated[int, typer.Option(help="Patches of a row, exactly: the latent transformer's length.")] = 256,
    row_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a row, at most; by default 1.3 x patches x patch size.")
    ] = None,
    learning_rate: LearningRate = 2e-3,
    table_learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the hash tables.")] = 3e-2,
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
    corpus = open_corpus(data, include, exclude, text_key, on_error, max_document_bytes)
    train_part, held_out = split(corpus, holdout_bytes, seed)
    if resume:
        _, patcher, _ = load_model(run)
        if patcher is None:
            raise ValueError(f"train: {run}: expected a run of a BLT, got one of an entropy model")
    elif entropy_model is None:
        raise ValueError("train: --entropy-model: expected a run or checkpoint, got none")
    else:
        patcher = entropy_patcher(
            load_entropy_model(entropy_model),
            train_part,
            threshold=parse_threshold(threshold),
            patch_size=patch_size,
            seed=seed,
            rule=rule,
            delta=delta,
            max_patch_length=max_patch_length,
        )
    console.print(f"threshold {patcher.config.threshold:.6f} nats")
    shape = RowShape(
        batch_size, row_tokens_for(row_patches, patch_size) if row_tokens is None else row_tokens, row_patches
    )
    optim = OptimConfig(learning_rate=learning_rate, sparse_learning_rate=table_learning_rate)
    with training_progress(console, "BLT", steps) as on_step:
        train_model(
            new_blt(preset, seed),
            train_part,
            held_out,
            shape,
            TrainConfig(steps, optim, autocast, 10, eval_every, checkpoint_every, seed),
            run,
            patcher=patcher,
            resume=resume,
            on_step=on_step,
            notes={
                "data": [str(path) for path in data],
                "holdout_bytes": holdout_bytes,
            },
        )
    report_skipped(train_part, held_out)
    console.print(f"checkpoint and metrics: {run}")


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
    """Bits per byte on text, beside what gzip, xz and zstd reach on the same bytes."""
    corpus = open_corpus(data, include, exclude, text_key, on_error, max_document_bytes)
    loaded, patcher, state = load_model(model)
    shape = RowShape(*state["notes"]["rows"])
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
        float | None, typer.Option(help="Entropy threshold in nats; by default the one the BLT was trained with.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write the entropy curve with the patches to this PNG.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the coloured patches to this HTML page.")] = None,
) -> None:
    """Show the patches of a text, coloured, with their entropies."""
    if (text is None) == (file is None):
        raise ValueError("patch: expected a text or --file, got " + ("neither" if text is None else "both"))
    data = text.encode() if text is not None else file.read_bytes()  # type: ignore[union-attr]
    loaded, patcher, _ = load_model(model)
    if threshold is not None:
        owner = loaded if isinstance(loaded, EntropyModel) else patcher.entropy_model if patcher is not None else None
        if owner is None:
            raise ValueError("patch: this BLT was trained without an entropy model: --threshold has no meaning")
        patcher = Patcher(PatcherConfig(threshold=threshold), owner)
    if patcher is None:
        raise ValueError("patch: an entropy model has no threshold of its own: pass --threshold")
    show_patches(console, patcher, data, png=png, html=html)


@app.command()
def flops(
    preset: Annotated[str, typer.Option(help="Shape of the BLT: tiny, 400M, 1B or 7B.")] = "1B",
    patch_size: Annotated[float, typer.Option(help="Mean bytes per patch.")] = 4.5,
    context: Annotated[int, typer.Option(help="Bytes of a document.")] = 8192,
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
    print_flops(console, f"{preset}, patches of {patch_size:g} bytes, documents of {context:,}", paper, inclusive)
    layers = config.latent.num_layers
    widths = [
        f"{equal_token_width(ledger.forward, layers, LLAMA_3_VOCAB, LLAMA_3_BYTES, context_bytes=context):,.0f}"
        for ledger in (paper, inclusive)
    ]
    console.print(
        f"A transformer of {layers} layers over Llama 3's tokens ({LLAMA_3_BYTES} bytes each) has the same FLOPs per "
        f"byte at width {widths[0]} (paper) or {widths[1]} (inclusive)."
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
    minutes: Annotated[float, typer.Option(help="Time for all of it on an idle machine, roughly.")] = 3.6,
    seed: Seed = 0,
) -> None:
    """Train an entropy model and a small BLT on real text, and compare it with gzip, xz and an n-gram model."""
    run_demo(console, run, data, minutes, seed)


def open_corpus(
    data: list[Path],
    include: list[str] | None,
    exclude: list[str] | None,
    text_key: str,
    on_error: str,
    max_document_bytes: int,
) -> Corpus:
    """The corpus that the options describe."""
    patterns: dict[str, Any] = {} if include is None else {"include": include}
    return Corpus(
        data,
        text_key=text_key,
        on_error=on_error,
        exclude=exclude or (),
        max_document_bytes=max_document_bytes,
        **patterns,
    )


def load_entropy_model(path: Path) -> EntropyModel:
    model, _, _ = load_model(path)
    if not isinstance(model, EntropyModel):
        raise ValueError(f"{path}: expected an entropy model, got a {type(model).__name__}")
    return model


def parse_threshold(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"train: --threshold: expected a number of nats or auto, got {text!r}") from None


def report_skipped(*parts: Corpus) -> None:
    """Says on the console what `--on-error skip` left out."""
    for part in parts:
        if part.skipped.total:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(part.skipped.counts.items()))
            console.print(f"skipped: {reasons}; first: {part.skipped.messages[0]}")
