"""Options of training runs: kept with every checkpoint, taken from there by `--resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from ..training.checkpoint import latest_checkpoint, list_checkpoints, load_state
from ..training.ranks import from_first, is_first, joined, lanes_of_rank
from .console import console, messages

# A resumed run takes these from its own command line. All other options decide what it computes, and stay what they
# were. (The device and how it computes decide how operations round, and nothing else.) The trainer checks that the text
# is the same, because it knows the files.
_FREE = (
    "data", "run", "resume", "eval_every", "checkpoint_every", "device", "compile_model", "checkpoint_activations"
)  # fmt: skip
_PATHS = ("entropy_model", "init")


class TrainingCommand(TyperCommand):
    """A command that trains. With --resume, an option that is given must be what the run has; others are the run's.

    Processes of torchrun train together, and only the first one prints what is not an error of its own.
    """

    def invoke(self, ctx: Any) -> Any:
        with joined():
            console.quiet = messages.quiet = not is_first()
            run = Path(ctx.params["run"])
            if ctx.params["resume"] and list_checkpoints(run):
                ctx.params.update(_settled(ctx, latest_checkpoint(run)))
            from_first(lambda: lanes_of_rank(ctx.params["lanes"]))  # now, and not after minutes of calibration
            return super().invoke(ctx)


def run_options(ctx: typer.Context) -> dict[str, Any]:
    """What decides a run, JSON-able, for the notes of its checkpoints: the command and its options."""
    options: dict[str, Any] = {}
    for name, value in ctx.params.items():
        if name not in _FREE:
            options[name] = list(value) if isinstance(value, (tuple, list)) else value
    for name in _PATHS:
        if options.get(name) is not None:
            options[name] = str(Path(options[name]).resolve())
    return {"command": ctx.command.name, "options": options}


def _settled(ctx: typer.Context, checkpoint: Path) -> dict[str, Any]:
    """The saved options, after a check of those on the command line."""
    notes = load_state(checkpoint).get("notes")
    notes = notes if isinstance(notes, dict) else {}
    now = run_options(ctx)
    if notes.get("command") != now["command"] or not isinstance(notes.get("options"), dict):
        by = f"`blt-kernels {notes['command']}`" if notes.get("command") else "another program"
        raise ValueError(f"{checkpoint.parent}: expected a run of `blt-kernels {now['command']}`, got one of {by}")
    saved = notes["options"]
    changed = [
        f"--{name.replace('_', '-')}: the run has {saved.get(name)}, got {value}"
        for name, value in now["options"].items()
        if ctx.get_parameter_source(name).name == "COMMANDLINE" and value != saved.get(name)  # type: ignore[union-attr]
    ]
    if changed:
        raise ValueError(f"{checkpoint.parent}: a resumed run keeps its settings: {'; '.join(changed)}")
    # Paths of models are not needed any more: the checkpoint holds the models.
    return {name: saved[name] for name in now["options"] if name in saved and name not in _PATHS}
