"""The next-byte loss, and the one definition of bits per byte."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .._checks import FLOAT_DTYPES, INT_DTYPES, can_look_at, check_device, check_shape, check_tensor, fail_value
from ..tokens import BYTE_OFFSET, IGNORE_INDEX


class NextByteLoss(NamedTuple):
    """Losses in nats: tensors without dimensions, float32; the number of targets is an int64.

    Attributes:
        mean: over the targets that are not `IGNORE_INDEX`; 0 where there is none. What training minimises.
        total: the sum over the same targets.
        num_targets: how many they are.
        text_total: the sum over those of them that stand for text, which are the ids from `BYTE_OFFSET` on: what
            `bits_per_byte` is computed from. Not differentiable.
    """

    mean: torch.Tensor
    total: torch.Tensor
    num_targets: torch.Tensor
    text_total: torch.Tensor


def next_byte_loss(logits: torch.Tensor, targets: torch.Tensor) -> NextByteLoss:
    """Negative log-likelihood of targets [B, N] under logits [B, N, V]; targets[b, i] is what follows byte i.

    Without a target that counts, the mean is 0.

    Raises:
        TypeError, ValueError: tensors that do not fit each other, targets that are neither in 0 .. V-1 nor -100. Values
            are looked at on the CPU, on CUDA with BLT_KERNELS_DEBUG=1, and not under torch.compile.
    """
    op = "next_byte_loss"
    check_tensor(op, "logits", logits, ndim=3, dtypes=FLOAT_DTYPES)
    check_tensor(op, "targets", targets, ndim=2, dtypes=INT_DTYPES)
    check_shape(op, "targets", targets, logits.shape[:2])
    check_device(op, "targets", targets, logits.device, "logits")
    counts = targets != IGNORE_INDEX
    if can_look_at(targets):
        wrong = targets[counts & ((targets < 0) | (targets >= logits.shape[2]))]
        if wrong.numel():
            raise fail_value(op, "targets", f"values in 0 .. {logits.shape[2] - 1}, or {IGNORE_INDEX}", int(wrong[0]))
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten().long(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    total, num_targets = losses.sum(), counts.sum()
    text_total = losses.detach().where(targets.flatten() >= BYTE_OFFSET, 0).sum()
    return NextByteLoss(total / num_targets.clamp(min=1), total, num_targets, text_total)


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Bits that a model spends on each byte of text: total_nats / (ln 2 * num_bytes).

    This is the one definition for training, evaluation and benchmarks, of byte models and of token models. Bytes are
    those of the text: a target of `BYTE_OFFSET` and above is one. A model also predicts the EOS after a document, but
    that is no byte of text, so that neither its loss nor its place in the row belongs in the figure:
    `NextByteLoss.text_total` leaves it out.

    Args:
        total_nats: negative log-likelihood of the targets that stand for text, summed.
        num_bytes: bytes of text that they stand for, at least 1.

    Raises:
        ValueError: there is no byte.
    """
    if num_bytes < 1:
        raise fail_value("bits_per_byte", "num_bytes", "at least one byte of text", num_bytes)
    return total_nats / (math.log(2) * num_bytes)
