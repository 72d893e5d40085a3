"""One training step: the loss of a model on batches of the loader, its gradients, and the update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..data import Batch
from ..layout import PatchLayout
from ..model import BLT, EntropyModel, NextByteLoss
from ..tokens import IGNORE_INDEX
from .optim import Optimizers
from .ranks import sum_of_tensor, sum_over_ranks


def training_step(
    model: EntropyModel | BLT, batches: Sequence[Batch], optimizers: Optimizers, *, autocast: bool
) -> tuple[NextByteLoss, torch.Tensor]:
    """Forward and backward of one batch after the other, and one update. Does not wait for the device.

    Gradients are those of the mean over the targets of all batches on all ranks. That is not the mean of
    their means, in which a target of a batch that is less full would weigh more.

    Args:
        batches: at least one; the lanes of the global batch that this process runs.
        autocast: bfloat16 autocast of the forward pass.

    Returns:
        The loss before the update, over all batches on all ranks, without a graph; and the 2-norm of all
        gradients before they are clipped (a scalar tensor).
    """
    device = next(model.parameters()).device
    [targets] = sum_over_ranks([sum(int(np.count_nonzero(batch.targets != IGNORE_INDEX)) for batch in batches)])
    num_targets = torch.tensor(targets, device=device)
    totals = torch.zeros(2, device=device)  # of all targets, and of those that stand for text
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(model, batch)
        (loss.total / num_targets.clamp(min=1)).backward()
        totals += torch.stack((loss.total.detach(), loss.text_total))
    total, text_total = sum_of_tensor(totals)
    return NextByteLoss(total / num_targets.clamp(min=1), total, num_targets, text_total), optimizers.step()


def loss_of(model: EntropyModel | BLT, batch: Batch) -> NextByteLoss:
    """The next-byte loss of a model on a batch."""
    device = next(model.parameters()).device
    tokens, targets, cu_seqlens = (
        torch.from_numpy(array).to(device) for array in (batch.tokens, batch.targets, batch.cu_seqlens)
    )
    longest = batch.longest_sequence
    if isinstance(model, BLT):
        layout = layout_of(batch, device)
        return model.loss(
            tokens,
            targets,
            layout,
            cu_seqlens=cu_seqlens,
            longest_sequence=longest,
            longest_patches=batch.longest_patches,
        )
    return model.loss(tokens, targets, cu_seqlens=cu_seqlens, longest_sequence=longest)


def layout_of(batch: Batch, device: torch.device) -> PatchLayout:
    """The layout of a batch that was cut at patch boundaries: C is the loader's constant, nothing can overflow."""
    assert batch.patch_lengths is not None and batch.next_is_start is not None
    return PatchLayout.from_lengths(
        torch.from_numpy(batch.patch_lengths).to(device),
        batch.tokens.shape[1],
        cu_seqlens=torch.from_numpy(batch.cu_seqlens).to(device),
        next_is_start=torch.from_numpy(batch.next_is_start).to(device),
    )
