"""`blt-kernels`: train, calibrate, evaluate, count FLOPs and look at patches from the command line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .. import doctor as doctor_
from .._devices import resolve_device
from .._files import naming
from ..training.ranks import FirstRankFailedError
from . import convert, generate, look, train
from .console import console, describe, say_warning
from .demo import run_demo
from .options import Device, Run, Seed, positive
from .resume import TrainingCommand

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Byte Latent Transformers on fused kernels: patching, training, evaluation.",
)
app.command("train-entropy", cls=TrainingCommand)(train.train_entropy)
app.command()(train.calibrate)
app.command(cls=TrainingCommand)(train.train)
app.command("eval")(look.evaluate)
app.command()(look.patch)
app.command()(generate.generate)
app.command()(look.flops)
app.command()(convert.convert)
app.command()(convert.byteify)


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
        # Rank 0 of a run on many says itself what it could not do.
        status = 1 if isinstance(error, FirstRankFailedError) else f"blt-kernels: {describe(error)}"
    try:
        sys.stdout.flush()
    except OSError as error:  # the disk is full, or nobody reads any more, and then there is nothing to say
        # Python flushes once more when it exits, and would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1 if isinstance(error, BrokenPipeError) else f"blt-kernels: standard output: {error.strerror}"
    sys.exit(status)


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
    device: Device = "auto",
) -> None:
    """Train an entropy model and a small BLT on real text, and compare it with gzip, xz, zstd and PPMd."""
    run_demo(console, run, data, minutes, seed, resolve_device(device))
