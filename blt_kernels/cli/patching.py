"""How `train` cuts text into patches: by entropy, which needs a model and a threshold, or without a model."""

from __future__ import annotations

import typer

from .._checks import check_choice
from ..training.patcher import METHODS, Patcher, PatcherConfig

_OF_ENTROPY = ("entropy_model", "threshold", "rule", "delta", "reset_at_newline")


def check_patching(ctx: typer.Context) -> None:
    """Refuses an option that was given and does not fit `--patching`, by name."""
    method = ctx.params["patching"]
    check_choice("train", "--patching", method, METHODS)
    fitting = {name: ("entropy",) for name in _OF_ENTROPY} | {"patch_size": ("entropy", "fixed")}
    for name, methods in fitting.items():
        if _is_given(ctx, name) and method not in methods:
            raise ValueError(
                f"train: --{name.replace('_', '-')}: expected with --patching {' or '.join(methods)} alone, "
                f"got --patching {method}"
            )
    if method == "entropy" and ctx.params["entropy_model"] is None:
        raise ValueError("train: --entropy-model: expected a run or checkpoint, got none")
    patch_size = ctx.params["patch_size"]
    if method == "fixed" and patch_size != int(patch_size):
        raise ValueError(f"train: --patch-size: expected a whole number with --patching fixed, got {patch_size:g}")


def patcher_of_start(ctx: typer.Context, patcher: Patcher | None) -> Patcher | None:
    """The patcher that came with `--init`, or None where another one is asked for.

    Refuses options that `--init` leaves without effect, by name.
    """
    if _is_given(ctx, "preset"):
        raise ValueError("train: --preset: expected none, because --init has a shape of its own")
    if patcher is None or ctx.params["entropy_model"] is not None or _is_given(ctx, "patching"):
        return None
    for name in (*_OF_ENTROPY, "patch_size", "max_patch_length"):
        if _is_given(ctx, name):
            raise ValueError(
                f"train: --{name.replace('_', '-')}: expected none, because --init has patches of its own; "
                "--entropy-model or --patching asks for others"
            )
    return patcher


def _is_given(ctx: typer.Context, name: str) -> bool:
    return ctx.get_parameter_source(name).name == "COMMANDLINE"  # type: ignore[union-attr]


def patcher_without_model(method: str, patch_size: float, max_patch_length: int | None) -> Patcher:
    """A patcher by spaces or of a fixed size."""
    size = int(patch_size) if method == "fixed" else None
    return Patcher(PatcherConfig(method, patch_size=size, max_patch_length=max_patch_length))


def describe_patching(config: PatcherConfig) -> str:
    if config.method == "entropy":
        return f"threshold {config.threshold:.6f} nats"
    return "patches end at spaces" if config.method == "spaces" else f"patches of {config.patch_size} bytes"
