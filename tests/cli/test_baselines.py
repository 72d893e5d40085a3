"""Compressors: against the files that they write, and on text that was seen before or cannot be compressed."""

from __future__ import annotations

import gzip
import lzma
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pyppmd
import pytest

from blt_kernels.cli import baselines
from blt_kernels.cli.baselines import compress_bits_per_byte

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


def test_alone_is_the_size_of_the_compressed_file(files: list[bytes]) -> None:
    held_out = files[:10]
    data = b"".join(held_out)
    bits = compress_bits_per_byte(iter(held_out))
    assert list(bits) == ["gzip -9", "xz -9e", "zstd -19 --long", "ppmd -o8"]
    assert bits["gzip -9"] == 8 * len(gzip.compress(data, 9, mtime=0)) / len(data)
    assert bits["xz -9e"] == pytest.approx(8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data))
    assert bits["ppmd -o8"] < bits["xz -9e"] < bits["zstd -19 --long"] < bits["gzip -9"]


def test_given_training_is_what_the_text_adds(files: list[bytes]) -> None:
    training, held_out = b"".join(files[:-5]), b"".join(files[-5:])
    given = compress_bits_per_byte(held_out, dictionary=training, compressors=["xz"])
    assert list(given) == ["xz -9e", "xz -6 given training text"]
    added = len(lzma.compress(training + held_out, preset=6)) - len(lzma.compress(training, preset=6))
    assert given["xz -6 given training text"] == pytest.approx(8 * added / len(held_out), rel=2e-3)
    assert given["xz -6 given training text"] < 8 * len(lzma.compress(held_out, preset=6)) / len(held_out) - 0.05


def test_ppmd_is_what_its_decoder_reads_and_learns_from_the_training_text(files: list[bytes]) -> None:
    training, held_out = b"".join(files[:-5]), b"".join(files[-5:])
    bits = compress_bits_per_byte(held_out, dictionary=training, compressors=["ppmd"])
    encoder = pyppmd.Ppmd7Encoder(8, 1 << 30)
    packed = encoder.encode(held_out) + encoder.flush()
    assert bits["ppmd -o8"] == 8 * len(packed) / len(held_out)
    assert pyppmd.Ppmd7Decoder(8, 1 << 30).decode(packed, len(held_out)) == held_out
    whole = pyppmd.Ppmd7Encoder(8, 1 << 30)
    added = len(whole.encode(training + held_out) + whole.flush())
    alone = pyppmd.Ppmd7Encoder(8, 1 << 30)
    added -= len(alone.encode(training) + alone.flush())
    assert bits["ppmd -o8 given training text"] == pytest.approx(8 * added / len(held_out), abs=8 * 16 / len(held_out))
    assert bits["ppmd -o8 given training text"] < bits["ppmd -o8"] - 0.03


def test_a_text_seen_before_costs_nothing() -> None:
    """Incompressible text, repeated: only a window that spans the dictionary makes it free."""
    text = np.random.default_rng(2).bytes(200_000)
    bits = compress_bits_per_byte(text, dictionary=[text, bytes(100_000)])
    alone = {name: value for name, value in bits.items() if "given" not in name}
    given = {name: value for name, value in bits.items() if "given" in name}
    assert len(alone) == len(given) == 4
    assert 8 < alone.pop("ppmd -o8") < 8.5  # its contexts of an incompressible text are worse than none
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
    bits = compress_bits_per_byte(text[:200_000], dictionary=zeros + pieces, compressors=["xz"])
    assert bits["xz -6 given the last 1 MiB of the training text"] < 0.1
    bits = compress_bits_per_byte(text[:200_000], dictionary=pieces + zeros, compressors=["xz"])
    assert bits["xz -6 given the last 1 MiB of the training text"] > 8
    assert "xz -6 given training text" in compress_bits_per_byte(b"a", dictionary=text, compressors=["xz"])


def test_without_a_package_a_warning_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("zstandard", "pyppmd"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.warns(UserWarning, match=r"pip install 'blt_kernels\[train\]'") as warned:
        assert list(compress_bits_per_byte(b"some text")) == ["gzip -9", "xz -9e"]
    assert len(warned) == 2 and "ppmd is left out" in str(warned[1].message)


def test_compressor_errors() -> None:
    with pytest.raises(ValueError, match="text: expected at least one byte"):
        compress_bits_per_byte([b""])
    with pytest.raises(ValueError, match=r"compressors: expected .*got 'bzip2'"):
        compress_bits_per_byte(b"a", compressors=["bzip2"])
    with pytest.raises(TypeError, match="text: expected bytes or an iterable of bytes, got an item of type str"):
        compress_bits_per_byte("text")  # type: ignore[arg-type]
