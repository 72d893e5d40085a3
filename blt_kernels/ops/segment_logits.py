"""segment_logits: entropies of the entropy model's logits and the patches they cut, in one pass."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._autograd import register_derivative
from .._checks import FLOAT_DTYPES, check_tensor, fail_value
from ..backend import backend_for
from ..layout import PatchLayout
from ._segment_options import EntropyOptions
from .entropy import entropy_backward
from .layout import fake_segmentation

_OP = "segment_logits"


def segment_logits(
    logits: torch.Tensor,
    threshold: float,
    *,
    rule: str = "threshold",
    delta: float | None = None,
    max_patch_length: int | None = None,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bos_patch: bool = True,
    capacity: int | None = None,
) -> tuple[torch.Tensor, PatchLayout]:
    """`entropy(logits)` and `segment` of it, bit for bit, in one call.

    `logits[b, t]` is the entropy model's prediction made at byte t, for byte t + 1. The entropies are differentiable,
    the layout is not. Bytes outside `seq_lens` or `cu_seqlens` belong to no patch, but their entropies are computed
    like all others: mask them where they are summed.

    Args:
        logits: [B, N, V], V >= 1, float32, float64, bfloat16 or float16.
        threshold, rule, delta, max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity: as in `segment`.

    Returns:
        entropies: [B, N] float32 nats (float64 for float64 logits; the decisions compare in fp32), as in `entropy`.
        layout: as in `segment`.

    Raises:
        TypeError, ValueError, RuntimeError: as `entropy` and `segment`.
    """
    check_tensor(_OP, "logits", logits, ndim=3, dtypes=FLOAT_DTYPES)
    if logits.shape[-1] < 1:
        raise fail_value(_OP, "logits", "shape [B, N, V] with V >= 1", f"shape {tuple(logits.shape)}")
    options = EntropyOptions(
        max_patch_length=max_patch_length,
        seq_lens=seq_lens,
        cu_seqlens=cu_seqlens,
        bos_patch=bos_patch,
        capacity=capacity,
        threshold=threshold,
        rule=rule,
        delta=delta,
    )
    options.check(_OP, logits, "logits")
    if backend_for(_OP, logits.device, logits) == "reference":
        return reference.segment_logits(logits, **options._asdict())
    entropies, *fields = _segment_logits(logits, *options)
    return entropies, PatchLayout(*fields)


@torch.library.register_fake("blt_kernels::segment_logits")
def _(
    logits: torch.Tensor,
    threshold: float,
    rule: str,
    delta: float | None,
    max_patch_length: int | None,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    bos_patch: bool,
    capacity: int | None,
) -> tuple[torch.Tensor, ...]:
    entropies = logits.new_empty(
        logits.shape[:-1], dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32
    )
    return entropies, *fake_segmentation(entropies, cu_seqlens, capacity)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: torch.Tensor, *layout_grads: None) -> tuple[torch.Tensor | None, ...]:
    # The op's other eight arguments have no gradient.
    return entropy_backward(grad, *ctx.saved_tensors), *[None] * 8


_segment_logits = register_derivative(_OP, _backward, _setup_context)
