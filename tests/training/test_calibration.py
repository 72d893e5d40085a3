"""Calibration: on text that the entropy model has not read, so that the patches of other text have the wanted size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blt_kernels.data import Corpus, encode
from blt_kernels.model import EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.training.calibration import CALIBRATION_BYTES, entropy_patcher, set_apart
from blt_kernels.training.optim import OptimConfig
from blt_kernels.training.rows import RowShape, mean_patch_length
from blt_kernels.training.runs import new_entropy_model, split, standard_library, train_model
from blt_kernels.training.trainer import TrainConfig


def size(corpus: Corpus) -> int:
    return sum(map(len, corpus))


@pytest.fixture
def texts(tmp_path: Path) -> Corpus:
    for i in range(60):
        text = f"# file {i}\n" + "".join(f"value_{j} = {i * j} + {j}\n" for j in range(5 + i % 7))
        (tmp_path / f"{i:02}.txt").write_text(text)
    return Corpus(tmp_path)


def test_the_calibration_text_is_the_same_for_every_run(texts: Corpus) -> None:
    """So that a BLT is calibrated on what no entropy model has read, with whatever seed both were trained."""
    names = set()
    for seed, holdout in ((0, None), (1, None), (1, 500)):
        parts = split(texts, holdout, seed)
        assert sum(map(size, parts)) == size(texts)
        train, calibration, held_out = ({file.name for file in part.files} for part in parts)
        assert not (train & calibration or train & held_out or calibration & held_out)
        names.add(tuple(sorted(calibration)))
    assert len(names) == 1
    rest, calibration_text = set_apart(texts)
    assert [tuple(sorted(file.name for file in calibration_text.files))] == list(names)
    assert size(texts) / 10 <= size(calibration_text) < size(texts) / 5
    assert size(rest) + size(calibration_text) == size(texts)


def test_of_a_large_text_a_mebibyte_is_set_apart(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text("a line of text\n" * (1 << 17))
    _, calibration = set_apart(Corpus(tmp_path))
    assert CALIBRATION_BYTES <= size(calibration) < CALIBRATION_BYTES + (2 << 20)


def test_calibration_gives_the_wanted_patch_size(texts: Corpus) -> None:
    torch.manual_seed(0)
    model = EntropyModel(EntropyModelConfig(TransformerConfig(32, 1, 2, 64, window=16)))
    patcher = entropy_patcher(model, texts, threshold=None, patch_size=3.0)
    documents = [encode(document) for document in texts]
    assert sum(map(len, documents)) / sum(len(patcher(tokens)) for tokens in documents) == pytest.approx(3.0, rel=0.02)
    assert entropy_patcher(model, texts, threshold=1.25, patch_size=3.0).config.threshold == 1.25


def test_calibration_reads_by_lines_where_the_patcher_does(texts: Corpus) -> None:
    torch.manual_seed(0)
    model = EntropyModel(EntropyModelConfig(TransformerConfig(32, 1, 2, 64, window=16)))
    patcher = entropy_patcher(model, texts, threshold=None, patch_size=3.0, reset_at_newline=True)
    assert patcher.config.reset_at_newline
    documents = [encode(document) for document in texts]
    # These lines begin alike, and so do their entropies then: not every mean can be reached.
    assert sum(map(len, documents)) / sum(len(patcher(tokens)) for tokens in documents) == pytest.approx(3.0, rel=0.1)
    assert patcher.config.threshold != entropy_patcher(model, texts, threshold=None, patch_size=3.0).config.threshold


def test_patches_of_held_out_text_have_the_wanted_size(tmp_path: Path) -> None:
    """Of a model that knows its training text far better than other text, as tables of n-grams soon do."""
    train, calibration, held_out = split(standard_library(), None, 0)
    seen = train.with_files(train.files[::12])  # little, and read several times
    model = new_entropy_model("ngram", 0)
    optim = OptimConfig(learning_rate=6e-3, sparse_learning_rate=3e-2, warmup_steps=10)
    train_model(model, seen, None, RowShape(4096, 512), TrainConfig(250, optim), tmp_path / "run")
    patcher = entropy_patcher(model, calibration, threshold=None, patch_size=4.5)
    assert mean_patch_length(held_out, patcher) == pytest.approx(4.5, rel=0.05)
    assert mean_patch_length(seen, patcher) > 1.1 * 4.5
