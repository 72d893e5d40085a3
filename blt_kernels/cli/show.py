"""What the CLI prints: tables of bits per byte and of FLOPs, patches, and what was left out."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .._checks import fail_value
from .._files import atomic_path
from ..data import Corpus, encode
from ..model.flops import Ledger
from ..training.patcher import Patcher
from .console import messages, say
from .visualize import check_picture_size, patches_of, render_html, render_table, render_text, save_png, summary

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
    """Prints `text` with its patches; writes the same as a picture and as an HTML page where asked.

    Patches are coloured on a terminal and, where there are no colours, divided by separators.
    """
    if png is not None and patcher.entropy_model is None:
        raise fail_value("patch", "--png", "patches made from entropies, which it draws", patcher.config.method)
    tokens = encode(text)
    if png is not None:
        check_picture_size(len(tokens))  # before the model reads the text, which takes a minute for a megabyte
    lengths, entropies = patcher.cut(tokens)
    patches = patches_of(tokens, lengths, entropies)
    threshold = patcher.config.threshold
    if png is not None and entropies is not None:
        with atomic_path(png) as partial:
            save_png(partial, patches, entropies, threshold=threshold)
    if html is not None:
        with atomic_path(html) as partial:
            partial.write_text(render_html(patches, threshold=threshold), encoding="utf-8")
    colour = console.color_system is not None and not console.no_color
    console.print(render_text(patches, colour=colour), soft_wrap=True)
    say(console, summary(patches, threshold))
    if len(text) <= TABLE_BYTES:
        console.print(render_table(patches))
    for what, path in (("page", html), ("picture", png)):
        if path is not None:
            say(messages, f"patches as a {what}: {path}")


def report_left_out(corpus: Corpus) -> None:
    """Says, apart from the results, which files a corpus leaves out and which patterns match nothing."""
    for remark in corpus.remarks():
        say(messages, remark)


def report_skipped(*parts: Corpus) -> None:
    """Says, apart from the results, what `--on-error skip` left out."""
    for part in parts:
        if part.skipped.total:
            say(messages, f"skipped: {part.skipped}")
