"""Commands that look at a trained model or at a shape: bits per byte, patches, FLOPs."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from .._devices import resolve_device
from .._files import naming
from .._optional import optional
from ..checkpoints import load_any
from ..model import BLTConfig, EntropyModel, EntropyModelConfig
from ..model.flops import blt_flops, equal_token_width
from ..training.evaluate import bits_per_byte, held_out_batches
from ..training.patcher import Patcher, PatcherConfig
from .baselines import compress_bits_per_byte
from .console import console, say
from .inputs import load_trained, open_corpus
from .options import (
    MAX_BYTES,
    BLTPreset,
    Data,
    Device,
    Exclude,
    Include,
    MaxDocument,
    OnError,
    TextKey,
    finite,
)
from .show import print_bits, print_flops, report_skipped, show_patches

# The tokenizer of Llama 3, with the bytes per token that the paper measured.
LLAMA_3_VOCAB, LLAMA_3_BYTES = 128256, 4.4


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="Run or checkpoint of a BLT or an entropy model, or directory of a published BLT.")
    ],
    data: Data,
    include: Include = None,
    exclude: Exclude = None,
    text_key: TextKey = "text",
    on_error: OnError = "raise",
    max_document_bytes: MaxDocument = 1 << 16,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Bits per byte on text, beside what gzip, xz, zstd and PPMd reach on the same bytes."""
    where = resolve_device(device)
    corpus = open_corpus(data, include, exclude, text_key, on_error, max_document_bytes)
    loaded, patcher, shape = load_trained(model, where, corpus)
    bits, num_bytes = bits_per_byte(loaded, held_out_batches(corpus, shape, patcher))
    rows = {type(loaded).__name__: bits} | compress_bits_per_byte(corpus)
    report_skipped(corpus)
    if as_json:
        typer.echo(json.dumps({"bytes": num_bytes, "bits_per_byte": rows}))
        return
    print_bits(console, f"bits per byte of {num_bytes:,} bytes", rows)


def patch(
    model: Annotated[
        Path, typer.Option(help="Run or checkpoint of a BLT or an entropy model, or directory of a published BLT.")
    ],
    text: Annotated[str | None, typer.Argument(help="The text itself.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the text from a file instead.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Entropy threshold in nats; by default the one the BLT was trained with.", callback=finite),
    ] = None,
    device: Device = "auto",
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
    loaded, patcher = load_any(model, device=resolve_device(device))
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


def flops(
    preset: BLTPreset = "1B",
    patch_size: Annotated[float, typer.Option(help="Mean bytes per patch.", min=1, callback=finite)] = 4.5,
    context: Annotated[int, typer.Option(help="Bytes of a sequence.", min=1, max=MAX_BYTES)] = 8192,
    entropy_preset: Annotated[str, typer.Option(help="Shape of the entropy model: tiny, ngram or 100M.")] = "100M",
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
