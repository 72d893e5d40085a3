"""The next-byte loss, and the one definition of bits per byte."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

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


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Bits per byte of text: the summed loss (nats) of the targets that stand for text, over the bytes they stand for.

    An end of document is predicted too, but it is no byte of text: neither its loss nor its place is counted.
    """
    return total_nats / math.log(2) / num_bytes


def next_byte_loss(logits: torch.Tensor, targets: torch.Tensor) -> NextByteLoss:
    """Negative log-likelihood of targets [B, N] under logits [B, N, V]; targets[b, i] is what follows byte i."""
    logits, targets = logits.float().flatten(0, 1), targets.flatten().long()
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    total = losses.sum()
    num_targets = (targets != IGNORE_INDEX).sum()
    text_total = torch.where(targets >= BYTE_OFFSET, losses.detach(), 0.0).sum()
    return NextByteLoss(total / num_targets.clamp(min=1), total, num_targets, text_total)
