"""Shows how a text was cut into patches: in the terminal, as an HTML page, as a picture.

The three take the same arguments:
    tokens: what was cut: `bytes`, or token ids [N] (BOS 1, EOS 2, byte b is b + 4), as lists, arrays or CPU tensors.
    lengths: of the patches in order [P]; empty slots (0) are passed over. A sum of N + 1 counts the next token, which
        is not there yet; a smaller sum than N leaves the rest in no patch.
    entropies: [N] in nats, or None; entropies[t] is that of the prediction of token t + 1, as `blt_kernels.entropy`
        gives it. Shown with a patch that starts at token s is entropies[s - 1]: how open its first token was.
    threshold: the one the text was cut with, in nats; only shown.
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._checks import fail_type, fail_value
from .._optional import new_figure, optional
from ..tokens import BYTE_OFFSET, VOCAB_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Group

_SPECIAL = {0: "BOE", 1: "BOS", 2: "EOS", 3: "SEP"}
# Pale blue, yellow, orange: low to high entropy, all readable under black text.
_RAMP = np.array([[214, 232, 245], [255, 240, 184], [255, 176, 122]], np.float64)
_SHADE = 0.9  # of every other patch in the terminal, where neighbours must be told apart by colour alone
_ROW = 96  # tokens in a row of the picture
_MAX_PICTURE = 4800
_INTEGERS = {"tokens": "bytes or a sequence of token ids", "lengths": "a sequence of integers"}
_GREY, _ORANGE = "#5b6b7a", "#c2410c"


@dataclass(frozen=True)
class _Glyph:
    """What stands for one character, one byte of a character that is not whole, or one special token."""

    text: str
    start: int
    size: int
    kind: str  # "text", "escape", "newline" or "special"


@dataclass(frozen=True)
class _Patch:
    index: int  # among the non-empty patches; -1: the tokens after the last patch
    start: int
    size: int
    entropy: float | None  # of the prediction of its first token; None if not known
    glyphs: tuple[_Glyph, ...]


def render_terminal(
    tokens: Any, lengths: Any, entropies: Any = None, *, threshold: float | None = None, table: bool = True
) -> Group:
    """A rich renderable (`rich.print` shows it): the text with patches as backgrounds, and below it a table of them.

    The background is the warmer, the higher the entropy of the patch's first token. Control characters, invalid UTF-8
    and characters that two patches share are escaped as in Python's `repr`.
    """
    console, text_module, table_module = optional("rich.console"), optional("rich.text"), optional("rich.table")
    patches, _ = _patches("render_terminal", tokens, lengths, entropies)
    text = text_module.Text()
    grid = table_module.Table("patch", "text", "start", "length", "entropy", header_style="bold", box=None)
    for column in (grid.columns[0], *grid.columns[2:]):
        column.justify = "right"
    for patch, colour in zip(patches, _colours(patches, _SHADE), strict=True):
        style = "" if colour is None else f"black on {colour}"
        cell = text_module.Text()
        for glyph in patch.glyphs:
            glyph_style = style if glyph.kind == "text" else f"{style} italic"
            cell.append(glyph.text, glyph_style)
            text.append(glyph.text, glyph_style)
            if glyph.kind == "newline":
                text.append("\n")
        if patch.index >= 0:
            grid.add_row(str(patch.index), cell, str(patch.start), str(patch.size), _nats(patch.entropy))
    summary = text_module.Text(_summary(patches, threshold), "dim")
    return console.Group(text, summary, grid) if table else console.Group(text, summary)


def render_html(
    tokens: Any, lengths: Any, entropies: Any = None, *, threshold: float | None = None, title: str = "Patches"
) -> str:
    """A self-contained HTML page: the text with patches as backgrounds (hover for their numbers), and a table."""
    patches, _ = _patches("render_html", tokens, lengths, entropies)
    spans, rows = [], []
    for patch, colour in zip(patches, _colours(patches), strict=True):
        marked = [
            html.escape(glyph.text) if glyph.kind == "text" else f"<i>{html.escape(glyph.text)}</i>"
            for glyph in patch.glyphs
        ]
        content = "".join(marked)
        broken = "".join(
            f"{mark}\n" if glyph.kind == "newline" else mark for mark, glyph in zip(marked, patch.glyphs, strict=True)
        )
        if patch.index < 0:
            spans.append(broken)
            continue
        numbers = f"patch {patch.index}: start {patch.start}, {_count(patch.size, 'token')}"
        if patch.entropy is not None:
            numbers += f", entropy {_nats(patch.entropy)} nats"
        spans.append(f'<span style="background:{colour}" title="{numbers}">{broken}</span>')
        rows.append(
            f'<tr><td>{patch.index}<td class="text"><span style="background:{colour}">{content}</span>'
            f"<td>{patch.start}<td>{patch.size}<td>{_nats(patch.entropy)}"
        )
    return _PAGE.format(
        title=html.escape(title),
        summary=html.escape(_summary(patches, threshold)),
        text="".join(spans),
        rows="\n".join(rows),
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
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
<h1>{title}</h1>
<p>{summary}</p>
<pre>{text}</pre>
<details><summary>table</summary><table>
<tr><th>patch<th class="text">text<th>start<th>length<th>entropy
{rows}
</table></details>
</body></html>
"""


def save_png(
    path: str | os.PathLike[str],
    tokens: Any,
    lengths: Any,
    entropies: Any,
    *,
    threshold: float | None = None,
    title: str | None = None,
) -> None:
    """A picture of the entropies over the text: above each token the entropy of its prediction, and the patches.

    A token whose point lies above the threshold starts a patch. Rows of 96 tokens; at most 4800 tokens.
    """
    if entropies is None:
        raise fail_value("save_png", "entropies", "the curve to draw", None)
    patches, values = _patches("save_png", tokens, lengths, entropies)
    size = sum(patch.size for patch in patches)
    if not 0 < size <= _MAX_PICTURE:
        raise fail_value("save_png", "tokens", f"1 to {_MAX_PICTURE} of them (an HTML page holds more)", size)
    # All in inches: a cell for each token, and margins that hold the labels.
    left, right, top, row_height, axes_height = 0.7, 0.2, 0.7, 1.75, 1.15
    cell = min(max(0.13, 5 / size), 0.3)
    width = max(left + cell * min(size, _ROW) + right, 6.0)
    height = top + row_height * -(-size // _ROW)
    figure = new_figure(width, height)
    summary = _summary(patches, threshold)
    figure.text(left / width, 1 - 0.3 / height, summary if title is None else f"{title}: {summary}", parse_math=False)
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
    patches: list[_Patch],
    values: npt.NDArray[np.float64],
    threshold: float | None,
) -> None:
    """Tokens `first` to `last` of the picture; token t takes the place from t to t + 1."""
    for patch in patches:
        if patch.start >= last or patch.start + patch.size <= first:
            continue
        if patch.index >= 0:
            band = "#dfe9f3" if patch.index % 2 else "#eff4f9"
            axes.axvspan(patch.start, patch.start + patch.size, color=band, linewidth=0, zorder=0)
            axes.axvline(patch.start, color="#9aa9b8", linewidth=0.8, zorder=1)
        for glyph in patch.glyphs:
            if first <= glyph.start + glyph.size / 2 < last:
                _draw_glyph(axes, glyph)
    # values[t] is of the prediction of t + 1, so it stands over t + 1.
    shown = np.arange(first, last)
    heights = np.where(shown > 0, values[shown - 1], np.nan)
    starts = np.isin(shown, [patch.start for patch in patches if patch.index >= 0])
    axes.plot(shown + 0.5, heights, color=_GREY, linewidth=1, zorder=2)
    axes.plot(shown[~starts] + 0.5, heights[~starts], "o", color=_GREY, markersize=2.5, zorder=3)
    axes.plot(shown[starts] + 0.5, heights[starts], "o", color=_ORANGE, markersize=4, zorder=3)
    if threshold is not None:
        axes.axhline(threshold, color=_ORANGE, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_glyph(axes: Axes, glyph: _Glyph) -> None:
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


def _patches(op: str, tokens: Any, lengths: Any, entropies: Any) -> tuple[list[_Patch], npt.NDArray[np.float64]]:
    """The non-empty patches with what to print for them, and the entropies [N] (NaN if there are none)."""
    if isinstance(tokens, bytes):
        ids = np.frombuffer(tokens, np.uint8).astype(np.int64) + BYTE_OFFSET
    else:
        ids = np.asarray(tokens)
    sizes = np.maximum(np.asarray(lengths), 0)
    for argument, value in (("tokens", ids), ("lengths", sizes)):
        if value.size and value.dtype.kind not in "iu":
            raise fail_type(op, argument, _INTEGERS[argument], f"dtype {value.dtype}")
        if value.ndim != 1:
            raise fail_value(op, argument, _INTEGERS[argument], f"shape {value.shape}")
    if ids.size and not 0 <= ids.min() <= ids.max() < VOCAB_SIZE:
        raise fail_value(op, "tokens", "ids of 0 to 259", f"{ids.min()} to {ids.max()}")
    if sizes.sum() > len(ids) + 1:
        raise fail_value(op, "lengths", f"a sum of at most {len(ids)} tokens and the next", int(sizes.sum()))
    values = np.full(len(ids), np.nan) if entropies is None else np.asarray(entropies, np.float64)
    if values.shape != ids.shape:
        raise fail_value(op, "entropies", f"shape {ids.shape}, one for each token", f"shape {values.shape}")

    patches: list[_Patch] = []
    ends = np.minimum(np.cumsum(sizes, dtype=np.int64), len(ids))
    start = 0
    for end in [*np.unique(ends[ends > 0]).tolist(), len(ids)]:
        if end > start:
            entropy = float(values[start - 1]) if start and np.isfinite(values[start - 1]) else None
            index = len(patches) if start < (ends[-1] if len(ends) else 0) else -1
            glyphs = tuple(_glyphs(ids[start:end].tolist(), start))
            patches.append(_Patch(index, start, end - start, entropy, glyphs))
        start = end
    return patches, values


def _glyphs(ids: Sequence[int], start: int) -> list[_Glyph]:
    """What to print for the tokens `ids` of one patch, the first of which is token `start`."""
    glyphs: list[_Glyph] = []
    at = 0
    while at < len(ids):
        if ids[at] in _SPECIAL:
            text, size, kind = f"<{_SPECIAL[ids[at]]}>", 1, "special"
        else:
            text, size, kind = _character(bytes(max(i - BYTE_OFFSET, 0) for i in ids[at : at + 4]))
        glyphs.append(_Glyph(text, start + at, size, kind))
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


def _colours(patches: list[_Patch], shade: float = 1.0) -> list[str | None]:
    """A background for each patch, by its entropy; None for the tokens in no patch."""
    known = [patch.entropy for patch in patches if patch.entropy is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    colours: list[str | None] = []
    for patch in patches:
        place = 0.0 if patch.entropy is None or high == low else 2 * (patch.entropy - low) / (high - low)
        scale = 1.0 if patch.index % 2 else shade
        channels = (round(scale * np.interp(place, range(3), channel)) for channel in _RAMP.T)
        colours.append(None if patch.index < 0 else "#" + "".join(f"{channel:02x}" for channel in channels))
    return colours


def _summary(patches: list[_Patch], threshold: float | None) -> str:
    cut = [patch.size for patch in patches if patch.index >= 0]
    text = f"{_count(sum(patch.size for patch in patches), 'token')}, {_count(len(cut), 'patch', 'patches')}"
    if cut:
        text += f", mean length {sum(cut) / len(cut):.2f}"
    return text if threshold is None else f"{text}, threshold {threshold:.3f} nats"


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _nats(entropy: float | None) -> str:
    return "" if entropy is None else f"{entropy:.3f}"
