"""The options of the functions that cut bytes into patches: made once from a call's arguments, and checked once."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._checks import check_bool, check_choice, check_int, check_real, fail_value
from .layout import check_segmentation

RULES = ("threshold", "monotonic", "combined")


class SegmentOptions(NamedTuple):
    """What every `segment*` function takes; the meaning of each option is documented at `segment`.

    The options are the last arguments of the compiled op, in its order, and by their names those of the function of the
    same name in `blt_kernels.reference`.
    """

    max_patch_length: int | None
    seq_lens: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    bos_patch: bool
    capacity: int | None

    def check(self, op: str, per_byte: torch.Tensor, owner: str) -> None:
        """Raises TypeError or ValueError unless they fit each other and `per_byte` [B, N, ...], argument `owner`."""
        _check_common(self, op, per_byte, owner)


class EntropyOptions(NamedTuple):
    """What `segment` and `segment_logits` take: first the rule that entropies decide by, then SegmentOptions."""

    threshold: float
    rule: str
    delta: float | None
    max_patch_length: int | None
    seq_lens: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    bos_patch: bool
    capacity: int | None

    def check(self, op: str, per_byte: torch.Tensor, owner: str) -> None:
        """Raises TypeError or ValueError unless they fit each other and `per_byte` [B, N, ...], argument `owner`."""
        check_choice(op, "rule", self.rule, RULES)
        check_real(op, "threshold", self.threshold)
        if self.rule == "combined":
            check_real(op, "delta", self.delta)
        elif self.delta is not None:
            expected = f"None with rule={self.rule!r} (only 'combined' has two thresholds)"
            raise fail_value(op, "delta", expected, self.delta)
        _check_common(self, op, per_byte, owner)


def _check_common(options: SegmentOptions | EntropyOptions, op: str, per_byte: torch.Tensor, owner: str) -> None:
    if options.max_patch_length is not None:
        check_int(op, "max_patch_length", options.max_patch_length, 1, 2**31 - 1)
    check_bool(op, "bos_patch", options.bos_patch)
    check_segmentation(op, per_byte, owner, options.seq_lens, options.cu_seqlens, options.capacity)
