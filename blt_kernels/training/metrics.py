"""What a training step achieves: bytes and FLOPs per second, and how full its rows are."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from ..data import Batch
from ..model import BLT, EntropyModel, EntropyModelConfig
from ..model.flops import blt_flops, entropy_model_flops
from .patcher import Patcher
from .ranks import world_size

# Dense bf16 FLOP/s of tensor cores, by the words of a GPU's name. From NVIDIA's data sheets, which give twice as much
# for the sparse matrices that nobody trains with. More words come first: a card has other clocks than the module.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 HBM3", 989e12),  # the name of the SXM module is "NVIDIA H100 80GB HBM3"
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
)


def device_peak(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device by its data sheet; None for a CPU, a part of a GPU (MIG), and a GPU not listed."""
    if device.type != "cuda":
        return None
    words = set(re.split(r"[\s-]+", torch.cuda.get_device_name(device)))
    if "MIG" in words:
        return None
    return next((peak for name, peak in _PEAKS if words.issuperset(name.split())), None)


class StepMeter:
    """Figures of training steps for the metrics.

    Args:
        model: what is trained.
        patcher: of a BLT. The FLOPs of its entropy model count, because making the patches is part of the work.
        device: where the model is.
    """

    def __init__(self, model: EntropyModel | BLT, patcher: Patcher | None, device: torch.device):
        self._model = model
        self._entropy_model: EntropyModelConfig | None = None
        if patcher is not None and patcher.entropy_model is not None:
            self._entropy_model = patcher.entropy_model.config
        peak = device_peak(device)
        self._peak = None if peak is None else peak * world_size()

    def measure(
        self, batches: Sequence[Batch], num_bytes: int, num_tokens: int, num_patches: int, seconds: float
    ) -> dict[str, float]:
        """The figures of a step.

        Args:
            batches: those of this rank, at least one.
            num_bytes, num_tokens, num_patches: bytes of text, tokens and patches in the batches of all ranks.
            seconds: that the step has taken, its batches included.

        Returns:
            `bytes_per_second`; `tokens_used` and, of a BLT, `slots_used`, the shares of the places for tokens and
            patches that hold one; `bytes_per_patch`, of a BLT; `flops_per_second` by the inclusive count of
            `model.flops` for training, in which padding counts for nothing; `mfu`, its share of the peak, where the
            peak of the device is known.
        """
        rows = len(batches) * world_size()
        first = batches[0]
        figures = {
            "bytes_per_second": num_bytes / seconds,
            "tokens_used": num_tokens / (rows * first.tokens.size),
        }
        if first.patch_lengths is not None:
            figures["slots_used"] = num_patches / (rows * first.patch_lengths.size)
            figures["bytes_per_patch"] = num_tokens / max(1, num_patches)
        flops = num_tokens * self._flops_of_token(batches, figures.get("bytes_per_patch", 1.0))
        figures["flops_per_second"] = flops / seconds
        if self._peak is not None:
            figures["mfu"] = flops / seconds / self._peak
        return figures

    def _flops_of_token(self, batches: Sequence[Batch], patch_size: float) -> float:
        """Of training. A token sees half of the sequence that it is in, as in a sequence of length sum n^2 / sum n."""
        lengths = np.concatenate([np.diff(batch.cu_seqlens) for batch in batches]).astype(np.float64)
        patch_size = max(1.0, patch_size)
        context = max(patch_size, float((lengths**2).sum() / max(1.0, lengths.sum())))
        if isinstance(self._model, BLT):
            return blt_flops(
                self._model.config, patch_size, context_bytes=context, entropy_model=self._entropy_model
            ).training
        return entropy_model_flops(self._model.config, context_bytes=context).training
