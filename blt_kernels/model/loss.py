"""Next-byte loss, and what bits-per-byte is computed from."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..tokens import IGNORE_INDEX


class NextByteLoss(NamedTuple):
    """Losses in nats over the targets that are not `IGNORE_INDEX`: tensors without dimensions, the count an int64."""

    mean: torch.Tensor
    total: torch.Tensor
    num_bytes: torch.Tensor

    def bits_per_byte(self) -> torch.Tensor:
        """total / (ln 2 * num_bytes). A BOS or EOS among the targets counts as a byte."""
        return self.total / (math.log(2) * self.num_bytes)


def next_byte_loss(logits: torch.Tensor, targets: torch.Tensor) -> NextByteLoss:
    """Negative log-likelihood of targets [B, N] under logits [B, N, V]; targets[b, i] is what follows byte i.

    Without a target that counts, the mean is 0.
    """
    logits, targets = logits.float().flatten(0, 1), targets.flatten().long()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    num_bytes = (targets != IGNORE_INDEX).sum()
    return NextByteLoss(total / num_bytes.clamp(min=1), total, num_bytes)
