"""`python -m benchmarks rows`: what it prints, and that its figures are those of the batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import rows
from blt_kernels.data import Corpus, DocumentStream, PackedBatches
from blt_kernels.training.patcher import Patcher, PatcherConfig


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    for i in range(80):
        (tmp_path / f"{i:02}.txt").write_text("some words of a text " * (20 + i))
    return Corpus(tmp_path)


def test_it_prints_and_keeps_both_kinds_of_rows(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "SHAPES", ((1024, 64),))
    rows.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    (folder,) = (tmp_path / "out").iterdir()
    (result,) = rows.read_all(folder)
    (row,) = result["rows"]
    assert row["packed"]["tokens"] > 0.9 > row["one_document"]["tokens"] and result["text"] == tmp_path.name
    (line,) = rows.table([result]).rows
    assert f"{row['packed']['tokens']:.1%}" in line and f"{row['packed']['tokens']:.1%}" in printed
    (path,) = (folder / "rows").iterdir()
    for damaged in ("{", "[]"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=f"{path.name}: not a"):
            rows.read_all(folder)


def test_shares_and_waits_are_those_of_the_batches(corpus: Corpus) -> None:
    def batches() -> PackedBatches:
        stream, patcher = DocumentStream(corpus, epochs=2), Patcher(PatcherConfig("spaces"))
        return PackedBatches(stream, 1024, 64, segmenter=patcher, row_patches=244)

    found = rows.packed(batches())
    made = list(batches())
    full = [batch.num_tokens / 1024 for batch in made[: len(made) // 2]]
    assert found.tokens == pytest.approx(np.mean(full), abs=0.02)
    assert 0 < found.wait <= 4 * 64 // 12 + 2 and found.densities == pytest.approx([4.2] * 4, rel=0.02)


def test_rows_of_one_document_are_counted_by_hand(tmp_path: Path) -> None:
    """BOS, 10 bytes and EOS in rows of 5 tokens and 4 patches: 1 + 2 + 2 tokens, again 4, and 3."""
    (tmp_path / "a.txt").write_text("0123456789")
    found = rows.one_document_a_row(Corpus(tmp_path), lambda tokens: np.array([1, 2, 2, 2, 2, 2, 1]), 4, 5)
    assert found == rows.Fullness(12 / 15, 7 / 12)
