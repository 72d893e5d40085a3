"""segment, segment_spaces, segment_fixed, calibrate_threshold: where patches start."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import reference
from .._checks import FLOAT_DTYPES, INT_DTYPES, check_choice, check_int, check_tensor, fail_type, fail_value
from ..layout import PatchLayout
from .layout import check_segmentation

RULES = ("threshold", "monotonic", "combined")


def segment(
    entropies: torch.Tensor,
    threshold: float,
    *,
    rule: str = "threshold",
    delta: float | None = None,
    max_patch_length: int | None = None,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bos_patch: bool = True,
    capacity: int | None = None,
) -> PatchLayout:
    check_tensor("segment", "entropies", entropies, ndim=2, dtypes=FLOAT_DTYPES)
    check_rule("segment", threshold, rule, delta)
    check_options("segment", entropies, "entropies", max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity)
    return reference.segment(
        entropies,
        threshold,
        rule=rule,
        delta=delta,
        max_patch_length=max_patch_length,
        seq_lens=seq_lens,
        cu_seqlens=cu_seqlens,
        bos_patch=bos_patch,
        capacity=capacity,
    )


def segment_spaces(
    tokens: torch.Tensor,
    *,
    byte_offset: int = 4,
    max_patch_length: int | None = None,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bos_patch: bool = True,
    capacity: int | None = None,
) -> PatchLayout:
    check_tensor("segment_spaces", "tokens", tokens, ndim=2, dtypes=INT_DTYPES)
    check_int("segment_spaces", "byte_offset", byte_offset, 0)
    check_options("segment_spaces", tokens, "tokens", max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity)
    return reference.segment_spaces(
        tokens,
        byte_offset=byte_offset,
        max_patch_length=max_patch_length,
        seq_lens=seq_lens,
        cu_seqlens=cu_seqlens,
        bos_patch=bos_patch,
        capacity=capacity,
    )


def segment_fixed(
    tokens: torch.Tensor,
    patch_size: int,
    *,
    max_patch_length: int | None = None,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bos_patch: bool = True,
    capacity: int | None = None,
) -> PatchLayout:
    check_tensor("segment_fixed", "tokens", tokens, ndim=2)
    check_int("segment_fixed", "patch_size", patch_size, 1)
    check_options("segment_fixed", tokens, "tokens", max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity)
    return reference.segment_fixed(
        tokens,
        patch_size,
        max_patch_length=max_patch_length,
        seq_lens=seq_lens,
        cu_seqlens=cu_seqlens,
        bos_patch=bos_patch,
        capacity=capacity,
    )


def check_rule(op: str, threshold: Any, rule: Any, delta: Any) -> None:
    """The threshold, and the difference threshold where the rule has one."""
    check_choice(op, "rule", rule, RULES)
    check_real(op, "threshold", threshold)
    if rule == "combined":
        check_real(op, "delta", delta)
    elif delta is not None:
        raise fail_value(op, "delta", f"None with rule={rule!r} (only 'combined' has two thresholds)", delta)


def check_real(op: str, argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise fail_type(op, argument, "a float", type(value).__name__)
    if math.isnan(value):
        raise fail_value(op, argument, "a number", "nan")


def check_options(
    op: str,
    per_byte: torch.Tensor,
    owner: str,
    max_patch_length: Any,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    bos_patch: Any,
    capacity: Any,
) -> None:
    """The options that every segment* function has. `per_byte` [B, N] is the argument named `owner`."""
    if max_patch_length is not None:
        check_int(op, "max_patch_length", max_patch_length, 1)
    if not isinstance(bos_patch, bool):
        raise fail_type(op, "bos_patch", "a bool", type(bos_patch).__name__)
    check_segmentation(op, per_byte, owner, seq_lens, cu_seqlens, capacity)
