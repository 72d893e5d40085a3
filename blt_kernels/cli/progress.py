"""A progress bar for training: bytes per second and bits per byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def training_progress(console: Console, name: str, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields the function that takes each step's metrics. Off a terminal it prints a line now and then instead."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(),
    )
    smooth: dict[str, float] = {}

    def figures(metrics: dict[str, Any]) -> str:
        for key in ("bits_per_byte", "bytes_per_second", "flops_per_second", "mfu"):
            if key in metrics:
                smooth[key] = 0.9 * smooth.get(key, metrics[key]) + 0.1 * metrics[key]
        if "held_out_bits_per_byte" in metrics:
            smooth["held_out"] = metrics["held_out_bits_per_byte"]
        text = f"{smooth['bits_per_byte']:.3f} bits/byte, {smooth['bytes_per_second'] / 1000:.0f} kB/s"
        if "flops_per_second" in smooth:
            text += f", {smooth['flops_per_second'] / 1e9:,.0f} GFLOP/s"
        if "mfu" in smooth:
            text += f" ({smooth['mfu']:.1%} of peak)"
        if "tokens_used" in metrics:
            text += f", bytes {metrics['tokens_used']:.0%}"
            text += f" and slots {metrics['slots_used']:.0%} used" if "slots_used" in metrics else " used"
        return text + (f", held out {smooth['held_out']:.3f}" if "held_out" in smooth else "")

    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=steps, figures="")

        def on_step(metrics: dict[str, Any]) -> None:
            text = figures(metrics)
            progress.update(task, completed=metrics["step"], figures=text)
            if not console.is_terminal and (metrics["step"] % max(1, steps // 10) == 0 or metrics["step"] == steps):
                line = f"{name}: step {metrics['step']}/{steps}, {text}"
                console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)

        yield on_step
