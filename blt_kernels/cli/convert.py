"""Commands that turn one directory of weights into another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints import from_pretrained, save_pretrained
from ..checkpoints.llama import byteify as byteified
from ..model import BLT, BLTConfig
from .console import console, say
from .options import Seed

Out = Annotated[Path, typer.Argument(help="Directory to make.")]


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Run, checkpoint, or directory of a published BLT.")],
    out: Out,
    format: Annotated[
        str, typer.Option(help="transformers, or meta: the names and files of the published code.")
    ] = "transformers",
) -> None:
    """Write a BLT and its patcher in a published format."""
    model, patcher = from_pretrained(source)
    save_pretrained(out, model, patcher, format=format)
    rule = "no patcher" if patcher is None else f"patches by {patcher.config.method}"
    say(console, f"{out}: {_size(model)}, {rule}")


def byteify(
    llama: Annotated[Path, typer.Argument(metavar="LLAMA_DIR", help="Directory of transformers' Llama.")],
    out: Out,
    preset: Annotated[str, typer.Option(help="Shape of all but the latent transformer: tiny, 400M, 1B or 7B.")] = "7B",
    seed: Seed = 0,
) -> None:
    """Start a BLT from a token model: its layers become the latent transformer, the rest is untrained."""
    config = dataclasses.replace(BLTConfig.preset(preset), hash_dim=None)
    model = byteified(llama, config, seed)
    save_pretrained(out, model, None)
    layers = model.config.latent.num_layers
    say(console, f"{out}: {_size(model)}, {layers} latent layers from {llama}; go on with `blt-kernels train --init`")


def _size(model: BLT) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"
