"""Bits per byte on held-out text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from ..data import Batch, Corpus, DocumentStream, Tokenizer
from ..model import BLT, EntropyModel
from ..model import bits_per_byte as bits_per_byte_of
from ..tokens import BYTE_OFFSET, IGNORE_INDEX
from .patcher import Patcher
from .rows import RowShape
from .trainer import loss_of


def held_out_batches(
    corpus: Corpus,
    shape: RowShape,
    patcher: Patcher | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    max_bytes: int | None = None,
) -> Iterator[Batch]:
    """Batches over every document once, in order, whose only targets are text: EOS is predicted but not counted.

    Args:
        max_bytes: stop after the batch that reaches this many bytes of text.
    """
    seen = 0
    for batch in shape.batches(DocumentStream(corpus, shuffle=False, epochs=1), patcher, tokenizer=tokenizer):
        targets = np.where(batch.targets >= BYTE_OFFSET, batch.targets, IGNORE_INDEX)
        yield dataclasses.replace(batch, targets=targets)
        seen += batch.num_bytes
        if max_bytes is not None and seen >= max_bytes:
            return


@torch.no_grad()
def bits_per_byte(model: EntropyModel | BLT, batches: Iterable[Batch]) -> tuple[float, int]:
    """Negative log-likelihood of the targets in bits, over the bytes they stand for: `(bits per byte, bytes)`.

    A token is predicted from what its row holds before it: context does not reach into the row before.

    Raises:
        ValueError: there is no byte to predict.
    """
    total, count = 0.0, 0
    for batch in batches:
        total += float(loss_of(model, batch).total)
        count += batch.num_bytes
    if count == 0:
        raise ValueError("bits_per_byte: batches: expected at least one byte of text, got none")
    return bits_per_byte_of(total, count), count
