"""Bits per byte on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from ..data import Batch, Corpus, DocumentStream, Tokenizer
from ..model import BLT, EntropyModel, loss
from .execution import uncompiled
from .patcher import Patcher
from .rows import RowShape
from .step import loss_of


def held_out_batches(
    corpus: Corpus,
    shape: RowShape,
    patcher: Patcher | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    max_bytes: int | None = None,
) -> Iterator[Batch]:
    """Batches over every document once, in order: only one is open at a time, so that no more is cut than is read.

    Args:
        max_bytes: stop after the batch that reaches this many bytes of text.
    """
    seen = 0
    documents = DocumentStream(corpus, shuffle=False, epochs=1)
    for batch in shape.batches(documents, patcher, tokenizer=tokenizer, open_documents=1):
        yield batch
        seen += batch.num_bytes
        if max_bytes is not None and seen >= max_bytes:
            return


@torch.no_grad()
def bits_per_byte(model: EntropyModel | BLT, batches: Iterable[Batch]) -> tuple[float, int]:
    """The bits per byte of a model on the text of `batches`: `(bits per byte, bytes)`; see `model.loss.bits_per_byte`.

    A token is predicted from what its sequence holds before it: context does not reach into the sequence before.

    Raises:
        ValueError: there is no byte to predict.
        FloatingPointError: the loss is not finite, as that of a model with a NaN among its weights.
    """
    total, count = 0.0, 0
    for batch in batches:
        total += float(loss_of(model, batch).text_total)
        count += batch.num_bytes
    if count == 0:
        raise ValueError("bits_per_byte: batches: expected at least one byte of text, got none")
    if not math.isfinite(total):
        raise FloatingPointError(f"bits_per_byte: model: expected a finite loss on the text, got {total} nats")
    return loss.bits_per_byte(total, count), count


def watch(batches: list[Batch]) -> Callable[[nn.Module], dict[str, float]]:
    """The function that a Trainer calls to evaluate: bits per byte of its model on these held-out batches."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, EntropyModel | BLT)
        with uncompiled(model):
            return {"held_out_bits_per_byte": bits_per_byte(model, batches)[0]}

    return evaluate
