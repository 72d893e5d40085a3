"""Draws docs/picture.svg, the picture of the README: `python docs/picture.py`. Needs matplotlib.

The entropies are those of the byte model in examples/patch_a_sentence.py on this text, with "the " before it.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon

TEXT = "saved FLOPs become saved seconds"
# Entropy (nats) of the prediction made before each byte.
ENTROPIES = (
    3.2, 1.4, 1.4, 1.0, 2.0, 2.0, 3.1, 1.5, 2.6, 1.1, 1.6, 1.4, 3.1, 2.0, 1.3, 1.6,
    1.7, 1.7, 2.6, 3.2, 1.4, 1.4, 1.0, 2.0, 2.0, 3.1, 1.4, 1.9, 1.6, 1.7, 2.6, 2.1,
)  # fmt: skip
THRESHOLD = 2.5

INK, FAINT, CARD, EDGE = "#1f2328", "#59636e", "#ffffff", "#d1d9e0"
PATCH_COLOURS = ("#bcd7f5", "#f9d9a8", "#c5e6c0", "#f3c4c4", "#d9cdf0")
LATENT, OP = "#3b5b8c", "#8a3b12"
LEFT, RIGHT, BOTTOM, TOP = -8.0, 47.5, -0.2, 18.6  # the card, in units of one byte's width


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "blt_kernels"  # the same ids in every run
    figure = Figure(figsize=(12.4, 12.4 * (TOP - BOTTOM) / (RIGHT - LEFT)), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(LEFT, RIGHT), ylim=(BOTTOM, TOP))
    axes.axis("off")
    # A card of its own, so that the picture reads alike on a white and on a dark page.
    axes.add_patch(_box(LEFT + 0.2, BOTTOM + 0.2, RIGHT - LEFT - 0.4, TOP - BOTTOM - 0.4, CARD, EDGE, 0.6))

    starts = [0] + [i for i in range(1, len(TEXT)) if ENTROPIES[i] > THRESHOLD]
    ends = [*starts[1:], len(TEXT)]
    spans = list(zip(starts, ends, strict=True))
    colours = [PATCH_COLOURS[i % len(PATCH_COLOURS)] for i in range(len(spans))]

    # Bytes, coloured by patch.
    for (start, end), colour in zip(spans, colours, strict=True):
        for i in range(start, end):
            _cell(axes, i, 16.0, TEXT[i], colour)
    # Entropies, and the threshold that they are compared with.
    for i, entropy in enumerate(ENTROPIES):
        hard = entropy > THRESHOLD
        axes.bar(i + 0.5, entropy * 0.7, bottom=12.4, width=0.7, color=OP if hard else "#c4ccd4")
    axes.plot([0, len(TEXT)], [12.4 + THRESHOLD * 0.7] * 2, color=OP, linewidth=1.2, linestyle=(0, (4, 3)))

    # Patches: what the bytes of each are pooled into, in the middle above the latent transformer.
    centres = [(index + 0.5) * len(TEXT) / len(spans) for index in range(len(spans))]
    for (start, end), centre, colour in zip(spans, centres, colours, strict=True):
        _funnel(axes, (start + 0.08, end - 0.08), 12.2, (centre - 1.3, centre + 1.3), 10.2, colour)
        axes.add_patch(_box(centre - 1.3, 9.0, 2.6, 1.2, colour, INK, 0.2))
    axes.add_patch(_box(0, 6.6, len(TEXT), 1.9, LATENT, LATENT, 0.3))
    axes.text(
        len(TEXT) / 2, 7.55, "latent transformer: runs once a patch, not once a byte",
        color="white", fontsize=12, ha="center", va="center",
    )  # fmt: skip
    # Back to bytes: byte i reads the last patch that is finished at it. The first patch is finished at its last byte.
    for index, centre in enumerate(centres):
        axes.add_patch(_box(centre - 1.3, 4.9, 2.6, 1.2, colours[index], INK, 0.2))
        first = ends[index] - 1
        last = ends[index + 1] - 1 if index + 1 < len(ends) else len(TEXT)
        _funnel(axes, (first + 0.08, last - 0.08), 2.6, (centre - 1.3, centre + 1.3), 4.9, colours[index])
        for i in range(first, last):
            _cell(axes, i, 1.0, TEXT[i + 1] if i + 1 < len(TEXT) else ".", colours[index])
    for i in range(ends[0] - 1):  # nothing is finished yet
        _cell(axes, i, 1.0, TEXT[i + 1], CARD)

    for y, label in (
        (16.75, "bytes"), (13.6, "how hard it is to\nguess each byte"), (9.6, "patches"), (5.5, "patches"),
        (1.75, "next bytes"),
    ):  # fmt: skip
        axes.text(-0.6, y, label, color=FAINT, fontsize=11, ha="right", va="center")
    for y, ops, what in (
        (16.75, ["hash_ngram_embedding"], "each byte, with hashed n-grams"),
        (13.9, ["linear_entropy", "segment"], "a patch starts above the threshold"),
        (10.3, ["patch_pool", "encoder_cross_attention"], "patches read their bytes"),
        (7.55, [], "plain PyTorch"),
        (3.7, ["decoder_cross_attention", "patch_gather"], "bytes read the last finished patch"),
    ):
        top = y + 0.52 * len(ops)
        for line, op in enumerate(ops):
            style = {"color": OP, "family": "monospace", "weight": "bold"}
            axes.text(33.0, top - 1.05 * line, op, fontsize=12, va="center", **style)
        axes.text(33.0, top - 1.05 * len(ops), what, color=FAINT, fontsize=11, va="center")
    figure.savefig(Path(__file__).with_suffix(".svg"), transparent=True, metadata={"Date": None})


def _box(x: float, y: float, width: float, height: float, face: str, edge: str, radius: float) -> FancyBboxPatch:
    style = f"round,pad=0,rounding_size={radius}"
    return FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1)


def _cell(axes: Axes, x: float, y: float, character: str, colour: str) -> None:
    axes.add_patch(_box(x + 0.06, y, 0.88, 1.5, colour, EDGE, 0.15))
    shown = character.replace(" ", "\N{OPEN BOX}")
    axes.text(x + 0.5, y + 0.72, shown, color=INK, fontsize=12, family="monospace", ha="center", va="center")


def _funnel(
    axes: Axes, wide: tuple[float, float], y_wide: float, narrow: tuple[float, float], y_narrow: float, colour: str
) -> None:
    corners = [(wide[0], y_wide), (wide[1], y_wide), (narrow[1], y_narrow), (narrow[0], y_narrow)]
    axes.add_patch(Polygon(corners, closed=True, facecolor=colour, alpha=0.45, edgecolor="none"))


if __name__ == "__main__":
    main()
