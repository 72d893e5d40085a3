"""Commands that train a model, or fit a patcher to text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer

from .._devices import resolve_device
from ..checkpoints import from_pretrained
from ..training.calibration import entropy_patcher, set_apart
from ..training.checkpoint import list_checkpoints
from ..training.load import load_patcher
from ..training.optim import OptimConfig
from ..training.ranks import from_first
from ..training.rows import MAX_TOKENS, RowShape, patches_of_row
from ..training.runs import empty_model, new_blt, new_entropy_model, open_run, split, train_model
from ..training.trainer import TrainConfig
from .console import console, say
from .inputs import load_entropy_model, open_corpus, rows_of, say_where_it_starts
from .options import (
    Autocast,
    BLTPreset,
    CheckpointActivations,
    CheckpointEvery,
    Compile,
    Data,
    Delta,
    Device,
    EvalEvery,
    Exclude,
    HoldOut,
    Include,
    Lanes,
    LatentLrScale,
    LearningRate,
    LongestSequence,
    MaxDocument,
    MaxPatch,
    OnError,
    PatchSize,
    ResetAtNewline,
    Resume,
    RowTokens,
    Rule,
    Run,
    Seed,
    Steps,
    TableLearningRate,
    TableOptimizer,
    TextKey,
    threshold_or_auto,
)
from .patching import check_patching, describe_patching, patcher_of_start, patcher_without_model
from .progress import training_progress
from .resume import run_options
from .show import report_skipped


def train_entropy(
    ctx: typer.Context,
    data: Data,
    run: Run,
    preset: Annotated[str, typer.Option(help="Shape of the entropy model: tiny, ngram or 100M.")] = "tiny",
    steps: Steps = 1000,
    row_tokens: RowTokens = 8192,
    longest_sequence: LongestSequence = None,
    lanes: Lanes = 1,
    learning_rate: LearningRate = 2e-3,
    table_learning_rate: TableLearningRate = 3e-2,
    table_optimizer: TableOptimizer = "rowwise_adagrad",
    device: Device = "auto",
    autocast: Autocast = False,
    compile_model: Compile = False,
    checkpoint_activations: CheckpointActivations = False,
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
    from_first(lambda: open_run(run, resume))
    where = resolve_device(device)
    shape = RowShape(row_tokens, longest_sequence or max(1, row_tokens // 8))
    model = new_entropy_model(preset, seed, where)
    corpus = open_corpus(data, include, exclude, text_key, on_error, max_document_bytes, run)
    train_part, _, held_out = split(corpus, holdout_bytes, seed)
    optim = OptimConfig(
        learning_rate=learning_rate,
        table_optimizer=table_optimizer,
        sparse_learning_rate=table_learning_rate,
    )
    config = TrainConfig(
        steps,
        optim,
        autocast,
        10,
        eval_every,
        checkpoint_every,
        seed,
        lanes,
        compile_model,
        checkpoint_activations,
    )
    say_where_it_starts(run, resume, where)
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


def calibrate(
    data: Data,
    entropy_model: Annotated[Path, typer.Option(help="Run or checkpoint of an entropy model.")],
    patch_size: PatchSize = 4.5,
    rule: Rule = "threshold",
    delta: Delta = None,
    max_patch_length: MaxPatch = None,
    reset_at_newline: ResetAtNewline = False,
    device: Device = "auto",
    include: Include = None,
    exclude: Exclude = None,
    text_key: TextKey = "text",
    on_error: OnError = "raise",
    max_document_bytes: MaxDocument = 1 << 16,
) -> None:
    """Print the entropy threshold (nats) that gives patches of a wanted mean size.

    It is measured on 1 MiB, or a tenth of the files where that is less: the part of the text that is read by no model
    which is trained on it.
    """
    where = resolve_device(device)
    _, text = set_apart(open_corpus(data, include, exclude, text_key, on_error, max_document_bytes))
    patcher = entropy_patcher(
        load_entropy_model(entropy_model, where),
        text,
        threshold=None,
        patch_size=patch_size,
        rule=rule,
        delta=delta,
        max_patch_length=max_patch_length,
        reset_at_newline=reset_at_newline,
    )
    report_skipped(text)
    say(console, repr(patcher.config.threshold))


def train(
    ctx: typer.Context,
    data: Data,
    run: Run,
    entropy_model: Annotated[
        Path | None, typer.Option(help="Run or checkpoint of an entropy model; a resumed run has its own.")
    ] = None,
    preset: BLTPreset = "tiny",
    init: Annotated[
        Path | None,
        typer.Option(
            help="Start from the weights of a run, a checkpoint or a published BLT in place of those of a preset, and "
            "with its patches, unless --entropy-model or --patching asks for others."
        ),
    ] = None,
    patching: Annotated[
        str,
        typer.Option(
            help="Where patches end: entropy (before bytes that are hard to guess), spaces, or fixed (after every "
            "--patch-size bytes). The last two need no entropy model."
        ),
    ] = "entropy",
    threshold: Annotated[
        str, typer.Option(help="Entropy threshold in nats, or auto: calibrate it.", callback=threshold_or_auto)
    ] = "auto",
    patch_size: PatchSize = 4.5,
    rule: Rule = "threshold",
    delta: Delta = None,
    max_patch_length: MaxPatch = None,
    reset_at_newline: ResetAtNewline = False,
    steps: Steps = 1000,
    row_tokens: RowTokens = 8192,
    longest_sequence: LongestSequence = None,
    lanes: Lanes = 1,
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
    table_learning_rate: TableLearningRate = 3e-2,
    table_optimizer: TableOptimizer = "rowwise_adagrad",
    latent_lr_scale: LatentLrScale = 1.0,
    device: Device = "auto",
    autocast: Autocast = False,
    compile_model: Compile = False,
    checkpoint_activations: CheckpointActivations = False,
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
    """Train a Byte Latent Transformer, by default on patches from a trained entropy model."""
    from_first(lambda: open_run(run, resume))
    where = resolve_device(device)
    shape = RowShape(row_tokens, longest_sequence or max(1, row_tokens // 8), row_patches)
    optim = OptimConfig(
        learning_rate=learning_rate,
        table_optimizer=table_optimizer,
        sparse_learning_rate=table_learning_rate,
        latent_lr_scale=latent_lr_scale,
    )
    config = TrainConfig(
        steps,
        optim,
        autocast,
        10,
        eval_every,
        checkpoint_every,
        seed,
        lanes,
        compile_model,
        checkpoint_activations,
    )
    model, patcher = None, None
    if resume and list_checkpoints(run):
        patcher, state = load_patcher(run, where)
        shape = rows_of(run, state)
        model = empty_model(state, where)
    elif init is not None:
        model, patcher = from_pretrained(init, dtype=torch.float32, device=where)
        patcher = patcher_of_start(ctx, patcher)
    if patcher is None:
        check_patching(ctx)
    corpus = open_corpus(data, include, exclude, text_key, on_error, max_document_bytes, run)
    train_part, calibration, held_out = split(corpus, holdout_bytes, seed)
    if patcher is None:
        if entropy_model is None:
            patcher = patcher_without_model(patching, patch_size, max_patch_length)
        else:
            patcher = entropy_patcher(
                load_entropy_model(entropy_model, where),
                calibration,
                threshold=None if threshold == "auto" else float(threshold),
                patch_size=patch_size,
                rule=rule,
                delta=delta,
                max_patch_length=max_patch_length,
                reset_at_newline=reset_at_newline,
            )
    if shape.row_patches is None:
        row_patches = from_first(lambda: patches_of_row(row_tokens, train_part, patcher))
        shape = dataclasses.replace(shape, row_patches=row_patches)
    say_where_it_starts(run, resume, where)
    say(console, f"{describe_patching(patcher.config)}, {shape.row_patches} patches a batch")
    with training_progress(console, "BLT", steps) as on_step:
        train_model(
            model or new_blt(preset, seed, where),
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
    report_skipped(train_part, calibration, held_out)
    say(console, f"checkpoint and metrics: {run}")
