"""Shows how a text was cut into patches: in the terminal, as an HTML page, as a picture.

Shown with a patch is the entropy (nats) of the prediction of its first token: the higher it is, the warmer is the
background of the patch. Control characters, invalid UTF-8 and characters that two patches share are escaped as in
Python's `repr`, so that no text can drive the terminal or the page.
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

from .._checks import fail_value
from .._optional import new_figure, optional
from ..tokens import BOE_ID, BOS_ID, BPE_ID, BYTE_OFFSET, EOS_ID

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What stands between patches where there is no colour; the same character of the text itself is escaped.
SEPARATOR = "|"
MAX_PICTURE = 4800  # tokens
_SPECIAL = {BOE_ID: "BOE", BOS_ID: "BOS", EOS_ID: "EOS", BPE_ID: "SEP"}
# Pale blue, yellow, orange: low to high entropy, all readable under black text.
_RAMP = np.array([[214, 232, 245], [255, 240, 184], [255, 176, 122]], np.float64)
_SHADE = 0.9  # of every other patch in the terminal, where neighbours must be told apart by colour alone
_ROW = 96  # tokens in a row of the picture
_GREY, _ORANGE = "#5b6b7a", "#c2410c"


@dataclass(frozen=True)
class Glyph:
    """What stands for one character, one byte of a character that is not whole, or one special token."""

    text: str
    start: int
    size: int
    kind: str  # "text", "escape", "newline" or "special"


@dataclass(frozen=True)
class Patch:
    """Tokens `start` to `start + size` of a document."""

    start: int
    size: int
    entropy: float | None  # of the prediction of its first token; None if not known
    glyphs: tuple[Glyph, ...]


def patches_of(
    tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], entropies: npt.NDArray[np.float32] | None
) -> list[Patch]:
    """The patches of a document with what to print for them.

    Args:
        tokens: [N], BOS and EOS included, byte b as b + 4.
        lengths: [P], each at least 1, with sum N.
        entropies: [N] in nats, or None; entropies[t] is of the prediction of token t + 1.
    """
    if lengths.sum() != len(tokens) or (lengths < 1).any():
        raise fail_value("patches_of", "lengths", f"lengths of at least 1 with sum {len(tokens)}", lengths.tolist())
    patches = []
    start = 0
    for size in lengths.tolist():
        value = float(entropies[start - 1]) if entropies is not None and start > 0 else float("nan")
        glyphs = tuple(_glyphs(tokens[start : start + size].tolist(), start))
        patches.append(Patch(start, size, value if np.isfinite(value) else None, glyphs))
        start += size
    return patches


def summary(patches: Sequence[Patch], threshold: float | None) -> str:
    """The numbers of tokens and patches in words; `threshold`: the one the text was cut with, in nats."""
    size = sum(patch.size for patch in patches)
    text = f"{_count(size, 'token')}, {_count(len(patches), 'patch', 'patches')}, mean length {size / len(patches):.2f}"
    return text if threshold is None else f"{text}, threshold {threshold:.3f} nats"


def render_text(patches: Sequence[Patch], *, colour: bool) -> Text:
    """The text with patches as backgrounds or, without `colour`, with a separator between them."""
    text = Text()
    for i, (patch, background) in enumerate(zip(patches, _colours(patches, _SHADE), strict=True)):
        if i > 0 and not colour:
            text.append(SEPARATOR)
        for glyph in patch.glyphs:
            shown = glyph.text if colour or glyph.text != SEPARATOR else f"\\x{ord(SEPARATOR):02x}"
            text.append(shown, _style(glyph, background))
            if glyph.kind == "newline":
                text.append("\n")
    return text


def render_table(patches: Sequence[Patch]) -> Table:
    """A row for each patch: its text, start, length and entropy."""
    grid = Table("patch", "text", "start", "length", "entropy", header_style="bold", box=None)
    for column in (grid.columns[0], *grid.columns[2:]):
        column.justify = "right"
    for i, (patch, background) in enumerate(zip(patches, _colours(patches, _SHADE), strict=True)):
        cell = Text()
        for glyph in patch.glyphs:
            cell.append(glyph.text, _style(glyph, background))
        grid.add_row(str(i), cell, str(patch.start), str(patch.size), _nats(patch.entropy))
    return grid


def render_html(patches: Sequence[Patch], *, threshold: float | None = None) -> str:
    """A self-contained HTML page: the text with patches as backgrounds (hover for their numbers), and a table."""
    spans, rows = [], []
    for i, (patch, background) in enumerate(zip(patches, _colours(patches), strict=True)):
        marked = [
            html.escape(glyph.text) if glyph.kind == "text" else f"<i>{html.escape(glyph.text)}</i>"
            for glyph in patch.glyphs
        ]
        broken = (
            f"{mark}\n" if glyph.kind == "newline" else mark for mark, glyph in zip(marked, patch.glyphs, strict=True)
        )
        numbers = f"patch {i}: start {patch.start}, {_count(patch.size, 'token')}"
        if patch.entropy is not None:
            numbers += f", entropy {_nats(patch.entropy)} nats"
        spans.append(f'<span style="background:{background}" title="{numbers}">{"".join(broken)}</span>')
        rows.append(
            f'<tr><td>{i}<td class="text"><span style="background:{background}">{"".join(marked)}</span>'
            f"<td>{patch.start}<td>{patch.size}<td>{_nats(patch.entropy)}"
        )
    return _PAGE.format(summary=html.escape(summary(patches, threshold)), text="".join(spans), rows="\n".join(rows))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Patches</title>
<style>
body {{ margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: #222;
  background: #fff }}
pre {{ font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
pre span, .text span {{ padding: .2em 0; border-radius: 3px; box-decoration-break: clone }}
pre span {{ margin-right: 2px }}
pre span:hover {{ outline: 2px solid #333 }}
i {{ color: #666; font-size: 85% }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .1rem .8rem; text-align: right; border-bottom: 1px solid #eee }}
.text {{ text-align: left; font-family: ui-monospace, monospace; white-space: pre-wrap }}
</style></head><body>
<h1>Patches</h1>
<p>{summary}</p>
<pre>{text}</pre>
<details><summary>table</summary><table>
<tr><th>patch<th class="text">text<th>start<th>length<th>entropy
{rows}
</table></details>
</body></html>
"""


def check_picture_size(size: int) -> None:
    """Refuses a text of more tokens than `save_png` draws."""
    if size > MAX_PICTURE:
        raise fail_value("patch", "--png", f"at most {MAX_PICTURE} tokens (an HTML page holds more)", size)


def save_png(
    path: str | os.PathLike[str],
    patches: Sequence[Patch],
    entropies: npt.NDArray[np.float32],
    *,
    threshold: float | None = None,
) -> None:
    """A picture of the entropies (as for `patches_of`) over the text: above each token that of its prediction.

    A token whose point lies above the threshold starts a patch. Rows of 96 tokens; at most 4800 tokens.
    """
    size = len(entropies)
    check_picture_size(size)
    values = entropies.astype(np.float64)
    # All in inches: a cell for each token, and margins that hold the labels.
    left, right, top, row_height, axes_height = 0.7, 0.2, 0.7, 1.75, 1.15
    cell = min(max(0.13, 5 / size), 0.3)
    width = max(left + cell * min(size, _ROW) + right, 6.0)
    height = top + row_height * -(-size // _ROW)
    figure = new_figure(width, height)
    figure.text(left / width, 1 - 0.3 / height, summary(patches, threshold))
    key = "a point is the entropy of the prediction of the token below it; orange: it starts a patch"
    figure.text(left / width, 1 - 0.5 / height, key, fontsize=8, color=_GREY)
    ceiling = 1.08 * max(0.1, threshold or 0.0, *values[np.isfinite(values)].tolist())
    for first in range(0, size, _ROW):
        last = min(first + _ROW, size)
        bottom = height - top - row_height * (first // _ROW) - axes_height
        box = (left / width, bottom / height, cell * (last - first) / width, axes_height / height)
        axes = figure.add_axes(box, xlim=(first, last), ylim=(0, ceiling), ylabel="nats")
        _draw_row(axes, first, last, patches, values, threshold)
    figure.savefig(path, dpi=120, format="png")


def _draw_row(
    axes: Axes,
    first: int,
    last: int,
    patches: Sequence[Patch],
    values: npt.NDArray[np.float64],
    threshold: float | None,
) -> None:
    """Tokens `first` to `last` of the picture; token t takes the place from t to t + 1."""
    for i, patch in enumerate(patches):
        if patch.start >= last or patch.start + patch.size <= first:
            continue
        band = "#dfe9f3" if i % 2 else "#eff4f9"
        axes.axvspan(patch.start, patch.start + patch.size, color=band, linewidth=0, zorder=0)
        axes.axvline(patch.start, color="#9aa9b8", linewidth=0.8, zorder=1)
        for glyph in patch.glyphs:
            if first <= glyph.start + glyph.size / 2 < last:
                _draw_glyph(axes, glyph)
    # values[t] is of the prediction of t + 1, so it stands over t + 1.
    shown = np.arange(first, last)
    heights = np.where(shown > 0, values[shown - 1], np.nan)
    starts = np.isin(shown, [patch.start for patch in patches])
    axes.plot(shown + 0.5, heights, color=_GREY, linewidth=1, zorder=2)
    axes.plot(shown[~starts] + 0.5, heights[~starts], "o", color=_GREY, markersize=2.5, zorder=3)
    axes.plot(shown[starts] + 0.5, heights[starts], "o", color=_ORANGE, markersize=4, zorder=3)
    if threshold is not None:
        axes.axhline(threshold, color=_ORANGE, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_glyph(axes: Axes, glyph: Glyph) -> None:
    font = optional("matplotlib.font_manager")
    face = font.get_font(font.findfont("DejaVu Sans Mono"))
    text = glyph.text
    if not all(face.get_char_index(ord(character)) for character in text):
        text = " ".join(f"U+{ord(character):04X}" for character in text)
    axes.text(
        glyph.start + glyph.size / 2,
        -0.05,
        text,
        transform=axes.get_xaxis_transform(),
        rotation=90 if len(text) > glyph.size else 0,
        ha="center",
        va="top",
        family="DejaVu Sans Mono",
        fontsize=7.5 if len(text) > glyph.size else 10,
        color="black" if glyph.kind == "text" else _GREY,
        parse_math=False,
    )


def _glyphs(ids: Sequence[int], start: int) -> list[Glyph]:
    """What to print for the tokens `ids` of one patch, the first of which is token `start`."""
    glyphs: list[Glyph] = []
    at = 0
    while at < len(ids):
        if ids[at] in _SPECIAL:
            text, size, kind = f"<{_SPECIAL[ids[at]]}>", 1, "special"
        else:
            text, size, kind = _character(bytes(max(i - BYTE_OFFSET, 0) for i in ids[at : at + 4]))
        glyphs.append(Glyph(text, start + at, size, kind))
        at += size
    return glyphs


def _character(data: bytes) -> tuple[str, int, str]:
    """The first character of `data` as printed, its number of bytes, and its kind."""
    for size in range(1, len(data) + 1):
        try:
            character = data[:size].decode()
        except UnicodeDecodeError:
            continue
        if character == "\n":
            return "↵", size, "newline"
        if character.isprintable():
            return character, size, "text"
        if size > 1:  # not \xa0, which would read as the byte a0
            return f"\\u{ord(character):04x}", size, "escape"
        return repr(character)[1:-1], size, "escape"
    return f"\\x{data[0]:02x}", 1, "escape"


def _style(glyph: Glyph, background: str) -> str:
    return f"black on {background}" + ("" if glyph.kind == "text" else " italic")


def _colours(patches: Sequence[Patch], shade: float = 1.0) -> list[str]:
    """A background for each patch, by its entropy; every other one is darkened to `shade`."""
    known = [patch.entropy for patch in patches if patch.entropy is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    colours = []
    for i, patch in enumerate(patches):
        place = 0.0 if patch.entropy is None or high == low else 2 * (patch.entropy - low) / (high - low)
        scale = 1.0 if i % 2 else shade
        channels = (round(scale * np.interp(place, range(3), channel)) for channel in _RAMP.T)
        colours.append("#" + "".join(f"{channel:02x}" for channel in channels))
    return colours


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _nats(entropy: float | None) -> str:
    return "" if entropy is None else f"{entropy:.3f}"
