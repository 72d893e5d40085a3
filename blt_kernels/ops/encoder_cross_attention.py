"""encoder_cross_attention: patch slots attend to the bytes of their patch."""

from __future__ import annotations

import torch

from .. import reference
from ..backend import backend_for
from ..layout import PatchLayout
from ._cross_attention import prepare, register

_OP = "encoder_cross_attention"


def encoder_cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: PatchLayout,
    *,
    scale: float | None = None,
    window: int = 1,
) -> torch.Tensor:
    """Attention of K query slots a patch over the bytes of the patch, softmax(scale * q k^T) v for each head.

    Byte Latent Transformer (arXiv 2412.09871), section 3.2.2, equations 5 to 8: the local encoder's pooled queries
    gather their patch from its bytes. Slot s of patch p is row p*K + s of `q` and of the result (patch-major).

    With `window` w, slots of patch p see the bytes of patches p-w+1 .. p of the same sequence, empty slots counted.
    The slots of an empty patch give 0 whatever the window.

    Time and memory are linear in bytes and slots (times the window). Scores, softmax and sums are in fp32 (fp64 for
    float64), in backward too. NaN and infinity in `q`, `k` or `v` behave as in a softmax over the keys that a row
    sees, and reach no other row. Under autocast `q`, `k` and `v` are cast to its dtype.

    Args:
        q: [B, C*K, H, E] float32, float64, bfloat16 or float16; K >= 1 slots for each of the layout's C patches.
        k: [B, N, Hkv, E], dtype of `q`; H a multiple of Hkv (query head h reads head h // (H / Hkv)).
        v: shape and dtype of `k`.
        layout: of B rows, N bytes and C slots.
        scale: of the scores; None is 1 / sqrt(E).
        window: patches that are seen, at least 1.

    Returns:
        [B, C*K, H, E], dtype of `q`.

    Raises:
        TypeError: not tensors of one float dtype, not a PatchLayout, a `window` that is no int.
        ValueError: shapes, devices or head counts that do not fit, window < 1.
    """
    q, k, v = prepare(_OP, q, k, v, layout, scale, window, slots="q")
    if backend_for(_OP, q.device, q, k, v) == "reference":
        return reference.encoder_cross_attention(q, k, v, layout, scale=scale, window=window)
    out, _ = _attention(q, k, v, layout.offsets, layout.cu_patches, scale, window)
    return out


_attention = register(_OP, num_layout_tensors=2)
