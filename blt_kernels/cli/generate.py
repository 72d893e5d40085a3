"""The command that lets a trained model write, and the sample that ends the demo."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .._devices import resolve_device
from ..checkpoints import load_any
from ..data import encode
from ..generation import as_text, stream_bytes
from ..model import BLT, EntropyModel
from ..training.patcher import Patcher
from .console import console, messages, printable, say
from .options import MAX_BYTES, Device


def generate(
    model: Annotated[Path, typer.Argument(help="Run or checkpoint of a BLT, or directory of a published one.")],
    prompt: Annotated[str, typer.Option(help="Text that is continued; empty: the beginning of a document.")] = "",
    max_bytes: Annotated[int, typer.Option(help="Longest continuation, in bytes.", min=0, max=MAX_BYTES)] = 200,
    streaming: Annotated[bool, typer.Option("--stream", help="Print each character when it is there.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte; above 0 bytes are drawn.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest bytes.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest bytes that together have this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from bytes with this share of the likeliest one's probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: bytes that were there before become less likely.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End after this text. May be given several times.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers; by default others every time.")] = None,
    exact_entropies: Annotated[
        bool, typer.Option(help="Cut patches by entropies with the bits of a full pass; slower.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Continue a text, with caches: a byte costs one step of the model, however long the text is."""
    where = resolve_device(device)
    loaded, patcher = load_any(model, device=where)
    if not isinstance(loaded, BLT) or patcher is None:
        raise ValueError(f"{model}: expected a BLT with a patcher, got {_without(loaded)}")
    sample = write_sample(
        console,
        loaded,
        patcher,
        os.fsencode(prompt),
        at_once=not streaming,
        max_new_bytes=max_bytes,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=[os.fsencode(text) for text in stop or ()],
        seed=seed,
        exact_entropies=exact_entropies,
    )
    say(messages, sample.summary())


def _without(model: BLT | EntropyModel) -> str:
    return "a BLT without one" if isinstance(model, BLT) else "an entropy model"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text that a model has written.

    Attributes:
        text: what follows the prompt, with U+FFFD for bytes that are no UTF-8.
        num_bytes: that were written.
        seconds: the prompt included.
        bytes_per_patch: the mean of the patches that begin in `text`; None where none does.
    """

    text: str
    num_bytes: int
    seconds: float
    bytes_per_patch: float | None

    def summary(self) -> str:
        speed = self.num_bytes / max(self.seconds, 1e-9)
        patches = "" if self.bytes_per_patch is None else f", {self.bytes_per_patch:.2f} bytes a patch"
        return f"{self.num_bytes:,} bytes in {self.seconds:.2f} s, {speed:,.0f} bytes/s{patches}"


def write_sample(
    where: Console, model: BLT, patcher: Patcher, prompt: bytes, *, at_once: bool, **options: Any
) -> Sample:
    """Prints the prompt and its continuation, by character or `at_once`; `options`: see `generate`."""
    begin = time.perf_counter()
    written = bytearray()

    def recorded() -> Iterator[bytes]:
        for piece in stream_bytes(model, patcher, prompt, **options):
            written.extend(piece)
            yield piece

    if at_once:
        text = "".join(as_text(recorded()))
        seconds = time.perf_counter() - begin
        _print(where, prompt.decode(errors="replace") + text)
    else:
        _print(where, prompt.decode(errors="replace"))
        text = ""
        for piece in as_text(recorded()):
            _print(where, piece)
            text += piece
        seconds = time.perf_counter() - begin
    _print(where, "\n")
    lengths = patcher(encode(prompt + bytes(written), eos=False))
    begun = int((lengths.cumsum() - lengths > len(prompt)).sum())  # BOS is in front of the prompt
    return Sample(text, len(written), seconds, len(written) / begun if begun else None)


def _print(where: Console, text: str) -> None:
    """As it is, except for characters that could drive the terminal."""
    where.file.write("".join(c if c in "\n\t" else printable(c) for c in text))
    where.file.flush()
