"""The options of the functions that cut bytes into patches: made once from a call's arguments, and checked once."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .._checks import check_bool, check_choice, check_int, check_real, fail_value
from .layout import check_segmentation

RULES = ("threshold", "monotonic", "combined")
_COMMON = ("max_patch_length", "seq_lens", "cu_seqlens", "bos_patch", "capacity")


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentOptions:
    """What every `segment*` function takes; the meaning of each option is documented at `segment`."""

    max_patch_length: int | None
    seq_lens: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    bos_patch: bool
    capacity: int | None

    def check(self, op: str, per_byte: torch.Tensor, owner: str) -> None:
        """Raises TypeError or ValueError unless they fit each other and `per_byte` [B, N, ...], argument `owner`."""
        if self.max_patch_length is not None:
            check_int(op, "max_patch_length", self.max_patch_length, 1, 2**31 - 1)
        check_bool(op, "bos_patch", self.bos_patch)
        check_segmentation(op, per_byte, owner, self.seq_lens, self.cu_seqlens, self.capacity)

    def keywords(self) -> dict[str, Any]:
        """The arguments of the function of the same name in `blt_kernels.reference`."""
        return {name: getattr(self, name) for name in _COMMON}

    def arguments(self) -> tuple[Any, ...]:
        """The last arguments of the compiled op, in its order."""
        return tuple(self.keywords().values())


@dataclasses.dataclass(frozen=True, eq=False)
class EntropyOptions(SegmentOptions):
    """What `segment` and `segment_logits` take: also the rule that entropies decide by."""

    threshold: float
    rule: str
    delta: float | None

    def check(self, op: str, per_byte: torch.Tensor, owner: str) -> None:
        check_choice(op, "rule", self.rule, RULES)
        check_real(op, "threshold", self.threshold)
        if self.rule == "combined":
            check_real(op, "delta", self.delta)
        elif self.delta is not None:
            expected = f"None with rule={self.rule!r} (only 'combined' has two thresholds)"
            raise fail_value(op, "delta", expected, self.delta)
        SegmentOptions.check(self, op, per_byte, owner)

    def keywords(self) -> dict[str, Any]:
        rule = {"threshold": self.threshold, "rule": self.rule, "delta": self.delta}
        return {**rule, **SegmentOptions.keywords(self)}
