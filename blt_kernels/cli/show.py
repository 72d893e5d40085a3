"""What the CLI prints: tables of bits per byte and of FLOPs, and patches."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..data import encode
from ..model.flops import Ledger
from ..training.patcher import Patcher
from .visualize import render_html, render_terminal, save_png

# Longer texts are shown without the table of patches.
TABLE_BYTES = 400


def print_bits(console: Console, title: str, rows: dict[str, float]) -> None:
    """A table of bits per byte, the best first."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    for name, bits in sorted(rows.items(), key=lambda row: row[1]):
        table.add_row(name, f"{bits:.3f}")
    console.print(table)


def print_flops(console: Console, title: str, paper: Ledger, inclusive: Ledger) -> None:
    """A table of FLOPs per byte by component in both counts: forward, its shares, and training."""
    unit, scale = ("MFLOP", 1e6) if inclusive.forward >= 1e7 else ("kFLOP", 1e3)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(f"\n{unit} per byte", no_wrap=True)
    for name in ("paper", "inclusive"):
        for heading in (f"{name}\nforward", "\n%", "\ntraining"):
            table.add_column(heading, justify="right")

    def cells(forward: float, training: float, total: float) -> tuple[str, str, str]:
        return f"{forward / scale:,.1f}", f"{100 * forward / total:.1f}", f"{training / scale:,.1f}"

    for name in inclusive.components:
        row = [name]
        for ledger in (paper, inclusive):
            if name in ledger.components:
                row += cells(ledger.components[name], ledger.training_components[name], ledger.forward)
            else:
                row += ["-", "", ""]
        table.add_row(*row)
    table.add_section()
    totals = [cells(ledger.forward, ledger.training, ledger.forward) for ledger in (paper, inclusive)]
    table.add_row("all", *totals[0], *totals[1])
    console.print(table)


def show_patches(
    console: Console, patcher: Patcher, text: bytes, *, png: Path | None = None, html: Path | None = None
) -> None:
    """Prints `text` with its patches coloured; writes the same as a picture and as an HTML page where asked."""
    tokens = encode(text)
    lengths = patcher(tokens)
    entropies = None if patcher.entropy_model is None else patcher.entropies(tokens)
    threshold = patcher.config.threshold
    console.print(render_terminal(tokens, lengths, entropies, threshold=threshold, table=len(text) <= TABLE_BYTES))
    if html is not None:
        html.write_text(render_html(tokens, lengths, entropies, threshold=threshold), encoding="utf-8")
        console.print(f"patches as a page: {html}")
    if png is not None:
        if entropies is None:
            raise ValueError("patch: --png draws entropies, and these patches are not made from entropies")
        save_png(png, tokens, lengths, entropies, threshold=threshold)
        console.print(f"patches as a picture: {png}")
