"""Pictures of patches: every byte is shown once, in its patch, harmlessly."""

from __future__ import annotations

import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from blt_kernels.cli.visualize import Patch, patches_of, render_html, render_table, render_text, save_png
from blt_kernels.data import encode

TEXT = 'if "日本" < x:\n\treturn \x1b[31m&\xa0'.encode()


def cut(text: bytes | list[int], lengths: list[int], entropies: Any = None) -> list[Patch]:
    """The patches of bytes, without BOS and EOS, or of tokens."""
    tokens = encode(text, bos=False, eos=False) if isinstance(text, bytes) else np.array(text, np.int64)
    values = None if entropies is None else np.array(entropies, np.float32)
    return patches_of(tokens, np.array(lengths, np.int64), values)


def printed(renderable: object, *, colour: bool = False) -> list[str]:
    console = Console(
        file=io.StringIO(), width=200, force_terminal=colour, color_system="truecolor" if colour else None, _environ={}
    )
    console.print(renderable)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


class Spans(HTMLParser):
    """The text of each span of the page's <pre>, and what stands outside of spans."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inside = False
        self.open: list[str] = []
        self.spans: list[str] = []
        self.styles: list[str] = []
        self.titles: list[str] = []
        self.rest = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside |= tag == "pre"
        if self.inside:
            self.open.append(tag)
            if tag == "span":
                self.spans.append("")
                self.styles.append(dict(attrs)["style"] or "")
                self.titles.append(dict(attrs)["title"] or "")

    def handle_endtag(self, tag: str) -> None:
        if self.inside:
            assert self.open.pop() == tag
            self.inside = bool(self.open)

    def handle_data(self, data: str) -> None:
        if "span" in self.open:
            self.spans[-1] += data
        elif self.inside:
            self.rest += data


def test_each_patch_is_one_span_of_escaped_text() -> None:
    # BOS | if " | 日 and the first byte of 本 | the rest of it | the rest and EOS
    tokens = encode(TEXT)
    patches = cut(tokens.tolist(), [1, 4, 4, 2, len(tokens) - 11])
    page = Spans(render_html(patches))
    assert page.rest == ""
    assert page.spans == [
        "<BOS>",
        'if "',
        "日\\xe6",
        "\\x9c\\xac",
        '" < x:↵\n\\treturn \\x1b[31m&\\u00a0<EOS>',
    ]
    assert page.titles[2] == "patch 2: start 5, 4 tokens"
    flat = printed(render_text(patches, colour=True))
    assert flat == ['<BOS>if "日\\xe6\\x9c\\xac" < x:↵', "\\treturn \\x1b[31m&\\u00a0<EOS>"]
    flat = printed(render_text(patches, colour=False))
    assert flat == ['<BOS>|if "|日\\xe6|\\x9c\\xac|" < x:↵', "\\treturn \\x1b[31m&\\u00a0<EOS>"]


def test_marks_of_the_text_itself() -> None:
    """An arrow is no line break, and a bar is no boundary."""
    patches = cut("a↵|b".encode(), [5, 1])
    assert Spans(render_html(patches)).spans == ["a↵|", "b"]
    assert printed(render_text(patches, colour=True)) == ["a↵|b"]
    assert printed(render_text(patches, colour=False)) == ["a↵\\x7c|b"]


def test_html_is_self_contained_and_escaped() -> None:
    page = render_html(cut(b"<script>alert('x')</script>", [27], [0.5] * 27), threshold=1.25)
    assert "<script" not in page
    assert "threshold 1.250 nats" in page
    assert not re.search(r"(src|href|url)\s*[=(]", page)


def test_entropy_shown_is_that_of_the_first_tokens_prediction() -> None:
    patches = cut(b"abcdefg", [1, 2, 3, 1], [0.5, 9.0, 2.25, 9.0, 9.0, 4.0, 9.0])
    page = Spans(render_html(patches))
    assert page.titles == [
        "patch 0: start 0, 1 token",
        "patch 1: start 1, 2 tokens, entropy 0.500 nats",
        "patch 2: start 3, 3 tokens, entropy 2.250 nats",
        "patch 3: start 6, 1 token, entropy 4.000 nats",
    ]
    assert page.styles[1] == "background:#d6e8f5"  # the lowest: pale blue
    assert page.styles[3] == "background:#ffb07a"  # the highest: orange
    rows = [line.split() for line in printed(render_table(patches))[1:]]
    assert rows == [["0", "a", "0", "1"], ["1", "bc", "1", "2", "0.500"], ["2", "def", "3", "3", "2.250"],
                    ["3", "g", "6", "1", "4.000"]]  # fmt: skip


def test_neighbours_differ_in_the_terminal() -> None:
    for entropies in (None, [1.0] * 6):
        (output,) = printed(render_text(cut(b"abcdef", [2, 2, 2], entropies), colour=True), colour=True)
        first, second, third = re.findall(r"48;2;([\d;]+)m(?:ab|cd|ef|a|c|e)", output)
        assert first == third != second


@given(st.binary(min_size=1, max_size=60), st.lists(st.integers(1, 7), max_size=20))
def test_every_byte_is_shown_once_in_its_patch(data: bytes, lengths: list[int]) -> None:
    """Undoing the escapes of a patch gives the patch's bytes."""
    kept: list[int] = []
    for length in lengths:
        if sum(kept) + length <= len(data):
            kept.append(length)
    if sum(kept) < len(data):
        kept.append(len(data) - sum(kept))
    data = data.replace(b"\\", b"/")  # the text's own backslashes are not escapes
    patches = cut(data, kept)
    page = Spans(render_html(patches))
    shown = render_text(patches, colour=False).plain.split("|")
    start = 0
    for i, length in enumerate(kept):
        assert unescape(page.spans[i]) == unescape(shown[i]) == data[start : start + length]
        start += length
    assert page.rest == "" and len(page.spans) == len(kept)


def unescape(shown: str) -> bytes:
    result = b""
    pattern = r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4,6})|\\([trn])|↵\n|(.)"
    for match in re.finditer(pattern, shown, re.DOTALL):
        byte, code, control, plain = match.groups()
        if byte is not None:
            result += bytes([int(byte, 16)])
        elif code is not None:
            result += chr(int(code, 16)).encode()
        elif control is not None:
            result += {"t": b"\t", "r": b"\r", "n": b"\n"}[control]
        else:
            result += plain.encode() if plain is not None else b"\n"
    return result


def open_png(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.convert("RGB")


def orange(image: Image.Image) -> int:
    """Pixels in the colour of the threshold and of the starts; all else is grey and blue."""
    pixels = np.asarray(image, np.int64)
    return int((pixels[..., 0] - pixels[..., 2] > 40).sum())


def test_picture_grows_by_rows_and_shows_the_threshold(tmp_path: Path) -> None:
    entropies = np.abs(np.sin(np.arange(5000))).astype(np.float32)
    images = {}
    for size in (2, 20, 96, 97, 250):
        text = (b"price $5 & $6 " * 400)[:size]
        patches = cut(text, [size // 2, size - size // 2], entropies[:size])
        save_png(tmp_path / "p.png", patches, entropies[:size])
        images[size] = open_png(tmp_path / "p.png")
    assert images[2].width == images[20].width == 720  # 6 inches
    assert images[96].width == images[97].width == images[250].width > 1500
    assert images[20].height == images[96].height < images[97].height < images[250].height
    save_png(tmp_path / "p.png", cut(b"x" * 97, [48, 49], entropies[:97]), entropies[:97], threshold=0.5)
    with_threshold = open_png(tmp_path / "p.png")
    assert with_threshold.size == images[97].size
    assert orange(with_threshold) > orange(images[97]) + 500
    save_png(tmp_path / "p.png", cut(b"x" * 97, [1] * 97, entropies[:97]), entropies[:97])
    assert orange(open_png(tmp_path / "p.png")) > orange(images[97]) + 500  # a dot at each start


def test_picture_takes_whatever_text_holds(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Characters without a glyph, dollar signs, NaN and infinity: no warning, no mathtext, a picture."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    tokens = [1, *encode(TEXT, bos=False, eos=False), *encode("🙂$x$\u202e\\", bos=False, eos=False), 0, 3, 2]
    entropies = np.linspace(0, 3, len(tokens), dtype=np.float32)
    entropies[3], entropies[5] = np.nan, np.inf
    patches = cut([int(token) for token in tokens], [1, 8, 20, len(tokens) - 29], entropies)
    save_png(tmp_path / "p.png", patches, entropies, threshold=1.0)
    assert open_png(tmp_path / "p.png").height > 200
    assert not recwarn.list


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for lengths in ([2], [4], [0, 3], [-1, 4]):
        with pytest.raises(ValueError, match="lengths: expected lengths of at least 1 with sum 3, got"):
            cut(b"abc", lengths)
    entropies = np.ones(4801, np.float32)
    with pytest.raises(ValueError, match=r"patch: --png: expected at most 4800 tokens .*got 4801"):
        save_png(tmp_path / "p.png", cut(b"x" * 4801, [4801], entropies), entropies)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib .*: pip install 'blt_kernels\[train\]'"):
        save_png(tmp_path / "p.png", cut(b"abc", [3], entropies[:3]), entropies[:3])
    assert not list(tmp_path.iterdir())
