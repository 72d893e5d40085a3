"""What the CLI prints: tables of bits per byte, and patches."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from .data import encode
from .patcher import Patcher
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


def show_patches(
    console: Console, patcher: Patcher, text: bytes, *, png: Path | None = None, html: Path | None = None
) -> None:
    """Prints `text` with its patches coloured; writes the same as a picture and as an HTML page where asked."""
    tokens = encode(text)
    lengths = patcher(tokens)
    entropies = None if patcher.entropy_model is None else patcher.entropies(tokens)[0].numpy()
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
