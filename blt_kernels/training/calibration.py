"""The entropy threshold that gives patches of a wanted mean size on text that the entropy model has not read.

A model is surer of the text that it was trained on than of any other. A threshold that is calibrated on that text is
too low for all other text, whose patches come out up to a quarter shorter. So a part of the text, which training must
leave out, is set apart for calibration. The text that a BLT is evaluated on is not used, because then the threshold
would be tuned on it.
"""

from __future__ import annotations

import dataclasses

import torch

from ..data import Corpus, DocumentStream, PackedBatches, split_corpus
from ..model import EntropyModel
from ..ops.segment import calibrate_threshold
from .lines import entropies_of
from .patcher import Patcher, PatcherConfig
from .ranks import from_first
from .rows import RowShape

CALIBRATION_BYTES = 1 << 20
CALIBRATION_SHARE = 10  # of a smaller text, one in this many bytes
CALIBRATION_ROW = 1 << 16  # tokens


def set_apart(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """(the rest, the calibration text): about 1 MiB, or a tenth of the files where that is less.

    The commands that train an entropy model and a BLT both leave it out. That they agree on it needs no record: it
    depends on the names and sizes of the files, and neither on a seed nor on what is held out besides. To a text that
    grows by some files it stays nearly the same, and never gets much of what was read before (see `split_corpus`).

    Raises:
        CorpusError: nothing would be left.
    """
    size = sum(file.size for file in corpus.files)
    return split_corpus(corpus, max(1, min(CALIBRATION_BYTES, size // CALIBRATION_SHARE)))


def entropy_patcher(
    model: EntropyModel,
    text: Corpus,
    *,
    threshold: float | None,
    patch_size: float,
    rule: str = "threshold",
    delta: float | None = None,
    max_patch_length: int | None = None,
    reset_at_newline: bool = False,
    num_bytes: int = CALIBRATION_BYTES,
) -> Patcher:
    """A patcher by entropy; without a threshold, the one that gives patches of `patch_size` bytes on `text`.

    Args:
        text: documents that the model was not trained on, see `set_apart`; `num_bytes` of them are read.
        rule, delta, max_patch_length: see `segment`.
        reset_at_newline: see `lines`.

    Raises:
        TypeError, ValueError: a wrong argument; the reachable range where `patch_size` is out of reach.
    """
    model.eval()
    # Made before the threshold is known, so that a wrong argument is found before text is read.
    config = PatcherConfig(
        rule=rule,
        threshold=0.0 if threshold is None else threshold,
        delta=delta,
        max_patch_length=max_patch_length,
        reset_at_newline=reset_at_newline,
    )
    if threshold is None:
        batches = RowShape(CALIBRATION_ROW, CALIBRATION_ROW).batches(DocumentStream(text, epochs=1), open_documents=1)
        threshold = from_first(
            lambda: calibrate(
                model,
                batches,
                patch_size,
                num_bytes=num_bytes,
                rule=rule,
                delta=delta,
                max_patch_length=max_patch_length,
                reset_at_newline=reset_at_newline,
            )
        )
    return Patcher(dataclasses.replace(config, threshold=threshold), model)


@torch.no_grad()
def calibrate(
    model: EntropyModel,
    batches: PackedBatches,
    patch_size: float,
    *,
    num_bytes: int,
    rule: str = "threshold",
    delta: float | None = None,
    max_patch_length: int | None = None,
    reset_at_newline: bool = False,
) -> float:
    """The threshold (nats) at which the first `num_bytes` tokens of `batches` have patches of `patch_size` bytes.

    Raises ValueError with the reachable range where `patch_size` is out of reach.
    """
    device = next(model.parameters()).device
    entropies, starts, total = [], [torch.zeros(1, dtype=torch.int64, device=device)], 0
    for batch in batches:
        used = batch.num_tokens
        cu_seqlens = torch.from_numpy(batch.cu_seqlens).to(device)
        tokens = torch.from_numpy(batch.tokens).to(device)
        found = entropies_of(model, tokens, cu_seqlens=cu_seqlens, reset_at_newline=reset_at_newline)
        entropies.append(found[:, :used])
        starts.append(cu_seqlens[1:] + total)
        total += used
        if total >= num_bytes:
            break
    return calibrate_threshold(
        torch.cat(entropies, dim=1),
        patch_size,
        rule=rule,
        delta=delta,
        max_patch_length=max_patch_length,
        cu_seqlens=torch.cat(starts),
    )
