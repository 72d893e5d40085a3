"""Compressors and the n-gram model: against their definitions, on real text and on sources of known entropy."""

from __future__ import annotations

import gzip
import lzma
import math
import sys
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from blt_kernels.cli import baselines
from blt_kernels.cli.baselines import NgramModel, compress_bits_per_byte

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """1.5 MB of Python source, in a fixed order that is not the alphabet's."""
    paths = sorted(STDLIB.glob("*.py"), key=lambda path: path.name[::-1])
    result: list[bytes] = []
    for path in paths:
        if sum(map(len, result)) < 1_500_000:
            result.append(path.read_bytes())
    return result


# n-gram model


class SlowKneserNey:
    """The textbook recursion over dictionaries of tuples, one n-gram at a time."""

    def __init__(self, order: int, documents: list[bytes]) -> None:
        self.order = order
        self.counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
        for document in documents:
            symbols = (256,) * order + tuple(document)
            for end in range(order, len(symbols)):
                self.counts[order][symbols[end - order : end + 1]] += 1
        for length in reversed(range(order)):
            for ngram in self.counts[length + 1]:
                self.counts[length][ngram[1:]] += 1
        self.followers: defaultdict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for length in range(order + 1):
            for ngram, count in self.counts[length].items():
                self.followers[(length, *ngram[:-1])].append((ngram[-1], count))
        self.discounts = [self.estimate(list(counts.values())) for counts in self.counts]

    @staticmethod
    def estimate(counts: list[int]) -> list[float]:
        n = [counts.count(c) for c in range(5)]
        if not (n[1] and n[2]):
            return [0, 0.5, 0.5, 0.5]
        y = n[1] / (n[1] + 2 * n[2])
        if not n[3]:
            return [0, y, y, y]
        modified = [0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
        return modified if min(modified[1:]) > 0 else [0, y, y, y]

    def probability(self, context: tuple[int, ...], byte: int) -> float:
        length = len(context)
        shorter = self.probability(context[1:], byte) if length else 1 / 256
        followers = self.followers.get((length, *context))
        if followers is None:
            return shorter
        total = sum(count for _, count in followers)
        taken = sum(self.discounts[length][min(count, 3)] for _, count in followers)
        count = self.counts[length][(*context, byte)]
        return (count - self.discounts[length][min(count, 3)]) / total + taken / total * shorter

    def bits_per_byte(self, documents: list[bytes]) -> float:
        bits = 0.0
        for document in documents:
            symbols = (256,) * self.order + tuple(document)
            for end in range(self.order, len(symbols)):
                bits -= math.log2(self.probability(symbols[end - self.order : end], symbols[end]))
        return bits / sum(map(len, documents))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_agrees_with_the_slow_definition(order: int, files: list[bytes]) -> None:
    training = [file[:1500] for file in files[:4]] + [b"", "naïve 日本語\0\xff".encode("latin-1", "ignore"), b"a"]
    held_out = [file[:700] for file in files[10:13]] + [b"", b"\x80\x81", b"unseen \xfe\xfd\xfc\xfb context"]
    model, slow = NgramModel(order).fit(training), SlowKneserNey(order, training)
    assert model.bits_per_byte(held_out) == pytest.approx(slow.bits_per_byte(held_out), rel=1e-12)
    for prefix in (b"", b"#", b"im", b"import s", b"\xfe\xfd\xfc\xfb"):
        context = ((256,) * order + tuple(prefix))[len(prefix) :]
        expected = [slow.probability(context, byte) for byte in range(256)]
        np.testing.assert_allclose(model.distribution(prefix), expected, rtol=1e-12)


def test_probabilities_sum_to_one(files: list[bytes]) -> None:
    model = NgramModel(3).fit(files[:20])
    random = np.random.default_rng(0)
    prefixes = [b"", b"i", b"\xff", b"def __init__(self"]
    prefixes += [random.bytes(3) for _ in range(20)]
    prefixes += [files[30][at : at + 3] for at in random.integers(0, 5000, 20)]
    for prefix in prefixes:
        distribution = model.distribution(prefix)
        assert distribution.shape == (256,)
        assert distribution.min() > 0
        assert distribution.sum() == pytest.approx(1, abs=1e-12)


def test_bits_per_byte_is_the_sum_over_every_byte_and_nothing_else(files: list[bytes]) -> None:
    """What the head of the module promises: each byte from its own document's prefix, no EOS, divided by bytes."""
    model = NgramModel(3).fit(files[:5])
    documents = [b"import os\n", b"", b"x", b"import os\n"]
    nll = [-np.log2(model.distribution(d[:i])[d[i]]) for d in documents for i in range(len(d))]
    assert len(nll) == 21
    assert model.bits_per_byte(documents) == pytest.approx(sum(nll) / 21, rel=1e-12)


def test_longer_contexts_help_on_real_text(files: list[bytes]) -> None:
    training, held_out = files[:-10], files[-10:]
    bits = [NgramModel(order).fit(training).bits_per_byte(held_out) for order in range(4)]
    assert bits[0] > bits[1] + 0.5 > bits[2] + 1.0 > bits[3] + 1.2
    # Order 0 is the entropy of the byte histogram, up to how the two parts differ.
    histogram = np.bincount(np.frombuffer(b"".join(held_out), np.uint8), minlength=256) / sum(map(len, held_out))
    entropy = -sum(p * math.log2(p) for p in histogram if p)
    assert entropy < NgramModel(0).fit(held_out).bits_per_byte(held_out) < entropy + 0.01


def test_sources_of_known_entropy() -> None:
    random = np.random.default_rng(1)
    uniform = NgramModel(3).fit(random.bytes(1 << 18)).bits_per_byte(random.bytes(1 << 16))
    assert 8 <= uniform < 8.15  # what sparse counts of long contexts cost
    cycle = NgramModel(3).fit(b"abcdefg" * 10_000).bits_per_byte(b"abcdefg" * 1000)
    assert cycle < 0.01
    # A Markov chain of order 1 over 4 symbols: its entropy rate, no less, and with enough data hardly more.
    steps = np.cumsum(random.choice(4, p=[0.7, 0.1, 0.1, 0.1], size=1 << 18)) % 4
    text = (steps + ord("a")).astype(np.uint8).tobytes()
    rate = -(0.7 * math.log2(0.7) + 0.3 * math.log2(0.1))
    bits = [NgramModel(order).fit(text[: 1 << 17]).bits_per_byte(text[1 << 17 :]) for order in (0, 1, 3)]
    assert bits[0] == pytest.approx(2, abs=0.01)
    assert bits[1] == pytest.approx(rate, abs=0.02)
    assert bits[2] == pytest.approx(rate, abs=0.02)


def test_contexts_do_not_cross_documents() -> None:
    apart = NgramModel(2).fit([b"ab"] * 100 + [b"cd"] * 100)
    # Nothing was seen after "ab" or after "b": the same as after bytes that never occurred.
    np.testing.assert_array_equal(apart.distribution(b"ab"), apart.distribution(b"\xff\xff"))
    assert apart.distribution(b"")[ord("c")] == pytest.approx(0.5, abs=0.01)
    joined = NgramModel(2).fit(b"abcd" * 100)
    assert joined.distribution(b"ab")[ord("c")] > 0.99


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_change_nothing(block: int, files: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents longer and shorter than a block, and documents that come one by one from a generator."""
    training = [file[:400] for file in files[:5]] + [b"", b"a", b"ab"]
    held_out = files[8][:1000]
    whole = NgramModel(3).fit(training).bits_per_byte(held_out)
    monkeypatch.setattr(baselines, "_BLOCK", block)
    assert NgramModel(3).fit(document for document in training).bits_per_byte(iter([held_out])) == whole


def test_ngram_errors() -> None:
    for order in (-1, 7):
        with pytest.raises(ValueError, match="order: expected 0 to 6"):
            NgramModel(order)
    with pytest.raises(ValueError, match="documents: expected at least one byte"):
        NgramModel().fit([b"", b""])
    with pytest.raises(RuntimeError, match="fit it before"):
        NgramModel().bits_per_byte(b"a")
    with pytest.raises(ValueError, match="documents: expected at least one byte"):
        NgramModel().fit(b"a").bits_per_byte([])
    with pytest.raises(
        TypeError, match=r"NgramModel\.fit: documents: expected bytes or an iterable of bytes, got .* str"
    ):
        NgramModel().fit(["text"])  # type: ignore[list-item]


# Compressors


def test_alone_is_the_size_of_the_compressed_file(files: list[bytes]) -> None:
    held_out = files[:10]
    data = b"".join(held_out)
    bits = compress_bits_per_byte(iter(held_out))
    assert list(bits) == ["gzip -9", "xz -9e", "zstd -19 --long"]
    assert bits["gzip -9"] == 8 * len(gzip.compress(data, 9, mtime=0)) / len(data)
    assert bits["xz -9e"] == pytest.approx(8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data))
    assert bits["xz -9e"] < bits["zstd -19 --long"] < bits["gzip -9"]


def test_given_training_is_what_the_text_adds(files: list[bytes]) -> None:
    training, held_out = b"".join(files[:-5]), b"".join(files[-5:])
    given = compress_bits_per_byte(held_out, dictionary=training, compressors=["xz"], preset=2)
    assert list(given) == ["xz -9e", "xz -2 given training text"]
    added = len(lzma.compress(training + held_out, preset=2)) - len(lzma.compress(training, preset=2))
    assert given["xz -2 given training text"] == pytest.approx(8 * added / len(held_out), rel=2e-3)
    assert given["xz -2 given training text"] < 8 * len(lzma.compress(held_out, preset=2)) / len(held_out) - 0.05


def test_a_text_seen_before_costs_nothing() -> None:
    """Incompressible text, repeated: only a window that spans the dictionary makes it free."""
    text = np.random.default_rng(2).bytes(200_000)
    bits = compress_bits_per_byte(text, dictionary=[text, bytes(100_000)], preset=1)
    alone = {name: value for name, value in bits.items() if "given" not in name}
    given = {name: value for name, value in bits.items() if "given" in name}
    assert len(alone) == len(given) == 3
    assert all(8 < value < 8.02 for value in alone.values())
    assert given.pop("gzip -9 given training text (last 32 KiB)") > 8  # out of its window's reach
    assert all(value < 0.05 for value in given.values()), given
    last = compress_bits_per_byte(text[:20_000], dictionary=text[:20_000], compressors=["gzip"])
    assert last["gzip -9 given training text (last 32 KiB)"] < 0.1


def test_of_a_long_dictionary_the_end_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    text = np.random.default_rng(3).bytes(1 << 20)
    monkeypatch.setattr(baselines, "DICTIONARY_BYTES", 1 << 20)
    pieces = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    zeros = [bytes(1000)] * 3000
    bits = compress_bits_per_byte(text[:200_000], dictionary=zeros + pieces, compressors=["xz"], preset=0)
    assert bits["xz -0 given the last 1 MiB of the training text"] < 0.1
    bits = compress_bits_per_byte(text[:200_000], dictionary=pieces + zeros, compressors=["xz"], preset=0)
    assert bits["xz -0 given the last 1 MiB of the training text"] > 8
    assert "xz -0 given training text" in compress_bits_per_byte(b"a", dictionary=text, compressors=["xz"], preset=0)


def test_without_zstandard_a_warning_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.warns(UserWarning, match=r"pip install 'blt_kernels\[train\]'"):
        assert list(compress_bits_per_byte(b"some text")) == ["gzip -9", "xz -9e"]


def test_compressor_errors() -> None:
    with pytest.raises(ValueError, match="text: expected at least one byte"):
        compress_bits_per_byte([b""])
    with pytest.raises(ValueError, match=r"compressors: expected .*got 'bzip2'"):
        compress_bits_per_byte(b"a", compressors=["bzip2"])
    with pytest.raises(ValueError, match="preset: expected 0 to 9, got 10"):
        compress_bits_per_byte(b"a", preset=10)
    with pytest.raises(TypeError, match="text: expected bytes or an iterable of bytes, got an item of type str"):
        compress_bits_per_byte("text")  # type: ignore[arg-type]
