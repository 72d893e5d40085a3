"""decoder_cross_attention: bytes attend to the slots of the last finished patches."""

from __future__ import annotations

import torch

from .. import reference
from ..backend import backend_for
from ..layout import PatchLayout
from ._cross_attention import prepare, register

_OP = "decoder_cross_attention"


def decoder_cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: PatchLayout,
    *,
    scale: float | None = None,
    window: int = 1,
) -> torch.Tensor:
    """Attention of bytes over the K slots of the last finished patch, softmax(scale * q k^T) v for each head.

    Byte Latent Transformer (arXiv 2412.09871), section 3.3.1: the local decoder reads its patch back, shifted so that
    byte i sees `layout.visible_ids[i]`, the last patch finished before the byte it predicts. Slot s of patch p is
    row p*K + s of `k` and `v` (patch-major).

    With `window` w, byte i sees patches visible-w+1 .. visible of the same sequence, empty slots counted: an empty
    slot is attended like any other. A byte that sees nothing (id -1) gives 0.

    Time and memory are linear in bytes and slots (times the window). Scores, softmax and sums are in fp32 (fp64 for
    float64), in backward too. NaN and infinity in `q`, `k` or `v` behave as in a softmax over the keys that a row
    sees, and reach no other row. Under autocast `q`, `k` and `v` are cast to its dtype.

    Args:
        q: [B, N, H, E] float32, float64, bfloat16 or float16.
        k: [B, C*K, Hkv, E], dtype of `q`; K >= 1 slots for each of the layout's C patches, H a multiple of Hkv
            (query head h reads head h // (H / Hkv)).
        v: shape and dtype of `k`.
        layout: of B rows, N bytes and C slots.
        scale: of the scores; None is 1 / sqrt(E).
        window: patches that are seen, at least 1.

    Returns:
        [B, N, H, E], dtype of `q`.

    Raises:
        TypeError: not tensors of one float dtype, not a PatchLayout, a `window` that is no int.
        ValueError: shapes, devices or head counts that do not fit, window < 1.
    """
    q, k, v = prepare(_OP, q, k, v, layout, scale, window, slots="k")
    if backend_for(_OP, q.device, q, k, v) == "reference":
        return reference.decoder_cross_attention(q, k, v, layout, scale=scale, window=window)
    out, _ = _attention(q, k, v, layout.visible_ids, layout.offsets, layout.cu_patches, scale, window)
    return out


_attention = register(_OP, num_layout_tensors=3)
