"""One training step: the loss of a model on a batch of the loader, its gradients, and the update."""

from __future__ import annotations

import torch

from ..data import Batch
from ..layout import PatchLayout
from ..model import BLT, EntropyModel, NextByteLoss
from .optim import Optimizers


def training_step(
    model: EntropyModel | BLT, batch: Batch, optimizers: Optimizers, *, autocast: bool
) -> tuple[NextByteLoss, torch.Tensor]:
    """Forward, backward and update. Does not wait for the device.

    Args:
        autocast: bfloat16 autocast of the forward pass.

    Returns:
        The loss before the update, and the 2-norm of all gradients before they are clipped (a scalar tensor).
    """
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = loss_of(model, batch)
    loss.mean.backward()
    return loss, optimizers.step()


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
