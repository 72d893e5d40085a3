"""Pictures of patches: every byte is shown once, in its patch, harmlessly."""

from __future__ import annotations

import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from blt_kernels.cli.visualize import render_html, render_terminal, save_png

TEXT = 'if "日本" < x:\n\treturn \x1b[31m&\xa0'.encode()
TOKENS = [1, *(byte + 4 for byte in TEXT), 2]


def terminal(*args: object, colour: bool = False, **options: object) -> str:
    console = Console(
        file=io.StringIO(), width=200, force_terminal=colour, color_system="truecolor" if colour else None, _environ={}
    )
    console.print(render_terminal(*args, **options))  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined]


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
    lengths = [1, 4, 4, 2, len(TOKENS) - 11]
    page = Spans(render_html(TOKENS, lengths))
    assert page.rest == ""
    assert page.spans == [
        "<BOS>",
        'if "',
        "日\\xe6",
        "\\x9c\\xac",
        '" < x:↵\n\\treturn \\x1b[31m&\\u00a0<EOS>',
    ]
    assert page.titles[2] == "patch 2: start 5, 4 tokens"
    flat = terminal(TOKENS, lengths, table=False).splitlines()
    assert flat[0] == '<BOS>if "日\\xe6\\x9c\\xac" < x:↵'
    assert flat[1].startswith("\\treturn \\x1b[31m&\\u00a0<EOS>")


def test_the_arrow_itself_is_no_line_break() -> None:
    assert Spans(render_html("a↵b".encode(), [5])).spans == ["a↵b"]
    assert terminal("a↵b".encode(), [5], table=False).splitlines()[0] == "a↵b"


def test_html_is_self_contained_and_escaped() -> None:
    page = render_html(b"<script>alert('x')</script>", [27], [0.5] * 27, threshold=1.25, title="<b>&")
    assert "<script" not in page
    assert "<title>&lt;b&gt;&amp;</title>" in page
    assert "threshold 1.250 nats" in page
    assert not re.search(r"(src|href|url)\s*[=(]", page)


def test_entropy_shown_is_that_of_the_first_tokens_prediction() -> None:
    entropies = [0.5, 9.0, 2.25, 9.0, 9.0, 4.0, 9.0]
    page = Spans(render_html(b"abcdefg", [1, 2, 3, 1], entropies))
    assert page.titles == [
        "patch 0: start 0, 1 token",
        "patch 1: start 1, 2 tokens, entropy 0.500 nats",
        "patch 2: start 3, 3 tokens, entropy 2.250 nats",
        "patch 3: start 6, 1 token, entropy 4.000 nats",
    ]
    assert page.styles[1] == "background:#d6e8f5"  # the lowest: pale blue
    assert page.styles[3] == "background:#ffb07a"  # the highest: orange
    rows = [line.split() for line in terminal(b"abcdefg", [1, 2, 3, 1], entropies).splitlines()[3:]]
    assert rows == [["0", "a", "0", "1"], ["1", "bc", "1", "2", "0.500"], ["2", "def", "3", "3", "2.250"],
                    ["3", "g", "6", "1", "4.000"]]  # fmt: skip


def test_neighbours_differ_in_the_terminal() -> None:
    for entropies in (None, [1.0] * 6):
        output = terminal(b"abcdef", [2, 2, 2], entropies, table=False, colour=True)
        first, second, third = re.findall(r"48;2;([\d;]+)m(?:ab|cd|ef|a|c|e)", output)
        assert first == third != second
    assert terminal(b"abcdef", [2, 2, 2], table=False).splitlines()[0] == "abcdef"


def test_lengths_follow_the_rules_of_a_layout() -> None:
    """Empty slots, negative lengths, the unseen next token, tokens after the last patch, tensors."""
    entropies = np.ones(5)
    expected = Spans(render_html(b"abcde", [2, 3], entropies)).spans
    assert expected == ["ab", "cde"]
    for lengths in ([0, 2, 0, 3, 0], [2, -1, 3], [2, 3, 1], [2, 4], torch.tensor([2, 3, 0], dtype=torch.int32)):
        page = Spans(render_html(b"abcde", lengths, torch.ones(5)))
        assert (page.spans, page.rest) == (expected, "")
    page = Spans(render_html(torch.tensor([1, 101, 102, 103]), [1, 1]))
    assert (page.spans, page.rest) == (["<BOS>", "a"], "bc")
    assert len(terminal(b"abc", [1, 1]).splitlines()) == 5  # the rest has no row in the table
    page = Spans(render_html(b"abc", []))
    assert (page.spans, page.rest) == ([], "abc")
    assert Spans(render_html(b"", [])).spans == []


@given(st.binary(max_size=60), st.lists(st.integers(0, 7), max_size=20))
def test_every_byte_is_shown_once_in_its_patch(data: bytes, lengths: list[int]) -> None:
    """Undoing the escapes of a patch gives the patch's bytes."""
    kept: list[int] = []
    for length in lengths:
        if sum(kept) + length <= len(data):
            kept.append(length)
    data = data.replace(b"\\", b"/")  # the text's own backslashes are not escapes
    page = Spans(render_html(data, kept))
    start = 0
    for span, length in zip(page.spans, filter(None, kept), strict=True):
        assert unescape(span) == data[start : start + length]
        start += length
    assert unescape(page.rest) == data[start:]


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
    entropies = np.abs(np.sin(np.arange(5000)))
    images = {}
    for size in (1, 20, 96, 97, 250):
        text = (b"price $5 & $6 " * 400)[:size]
        save_png(tmp_path / "p.png", text, [size // 2, size - size // 2], entropies[:size])
        images[size] = open_png(tmp_path / "p.png")
    assert images[1].width == images[20].width == 720  # 6 inches
    assert images[96].width == images[97].width == images[250].width > 1500
    assert images[20].height == images[96].height < images[97].height < images[250].height
    save_png(tmp_path / "p.png", b"x" * 97, [48, 49], entropies[:97], threshold=0.5)
    with_threshold = open_png(tmp_path / "p.png")
    assert with_threshold.size == images[97].size
    assert orange(with_threshold) > orange(images[97]) + 500
    save_png(tmp_path / "p.png", b"x" * 97, [1] * 97, entropies[:97])
    assert orange(open_png(tmp_path / "p.png")) > orange(images[97]) + 500  # a dot at each start


def test_picture_takes_whatever_text_holds(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Characters without a glyph, dollar signs, NaN and infinity: no warning, no mathtext, a picture."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    tokens = [*TOKENS[:-1], *(byte + 4 for byte in "🙂$x$\u202e\\".encode()), 0, 3, 2]
    entropies = np.linspace(0, 3, len(tokens))
    entropies[3], entropies[5] = np.nan, np.inf
    save_png(tmp_path / "p.png", tokens, [1, 8, 20], entropies, threshold=1.0, title="cost: $x$ _^")
    assert open_png(tmp_path / "p.png").height > 200
    assert not recwarn.list


def test_errors(tmp_path: Path) -> None:
    for function in (render_terminal, render_html):
        op = function.__name__
        with pytest.raises(ValueError, match=f"{op}: lengths: expected a sum of at most 3 tokens and the next, got 5"):
            function(b"abc", [5])
        with pytest.raises(ValueError, match=rf"{op}: entropies: expected shape \(3,\).*got shape \(2,\)"):
            function(b"abc", [3], [1.0, 2.0])
        with pytest.raises(ValueError, match=f"{op}: tokens: expected ids of 0 to 259, got 1 to 260"):
            function([1, 260], [2])
        with pytest.raises(ValueError, match=f"{op}: tokens: expected bytes or a sequence of token ids"):
            function(torch.zeros(1, 3, dtype=torch.int64), [3])
        with pytest.raises(TypeError, match=f"{op}: tokens: expected bytes or a sequence of token ids, got dtype <U3"):
            function("abc", [3])
        with pytest.raises(TypeError, match=f"{op}: lengths: expected a sequence of integers"):
            function(b"abc", [1.5])
    with pytest.raises(ValueError, match=r"save_png: tokens: expected 1 to 4800 of them.*got 4801"):
        save_png(tmp_path / "p.png", b"x" * 4801, [4801], np.ones(4801))
    with pytest.raises(ValueError, match=r"save_png: tokens: expected 1 to 4800 of them.*got 0"):
        save_png(tmp_path / "p.png", b"", [], [])
    with pytest.raises(ValueError, match="save_png: entropies: expected the curve to draw, got None"):
        save_png(tmp_path / "p.png", b"abc", [3], None)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich.console", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"rich is missing: pip install 'blt_kernels\[train\]'"):
        render_terminal(b"abc", [3])
    with pytest.raises(ImportError, match=r"matplotlib is missing: pip install 'blt_kernels\[train\]'"):
        save_png(tmp_path / "p.png", b"abc", [3], [1.0] * 3)
    assert render_html(b"abc", [3])  # needs neither
