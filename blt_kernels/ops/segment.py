"""segment, segment_spaces, segment_fixed, calibrate_threshold: where patches start."""

from __future__ import annotations

import math

import torch

from .. import reference
from .._checks import FLOAT_DTYPES, INT_DTYPES, check_int, check_real, check_tensor, check_values, fail_value
from ..backend import backend_for
from ..layout import PatchLayout
from ..reference.layout import Fields
from ..tokens import BYTE_OFFSET
from ._segment_options import EntropyOptions, SegmentOptions
from .layout import fake_segmentation


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
    """Cuts bytes into patches where the next byte is hard to predict.

    Byte Latent Transformer (arXiv 2412.09871), section 2.3. `entropies[b, t]` belongs to the prediction made at byte
    t, for byte t + 1. Byte t + 1 of a sequence starts a patch if

    - "threshold": e[t] > threshold;
    - "monotonic": e[t] - e[t-1] > threshold;
    - "combined": e[t] > threshold and e[t] - e[t-1] > delta.

    Position 0 of a sequence always starts a patch. With `bos_patch` position 1 does too, so that BOS is a patch by
    itself, e[0] is never used, and position 2, which would need e[0] for a difference, starts one under "monotonic" and
    "combined". Without it the threshold rule applies from e[0] on, and the difference rules from e[1] - e[0] on.
    ("combined" is the published `threshold_add` without the accident that its position 3 never starts a patch.)

    The decision of a sequence's last byte is about a byte not seen yet: it says whether the last patch is finished
    (`visible_ids`), and makes no patch. Patches of a prefix are the prefix of the patches.

    Comparisons are in fp32: entropies of another dtype, the threshold and `delta` are rounded to it first. (Entropies
    that were computed in bf16 move about 7 % of the boundaries; `entropy` returns fp32.) A comparison with NaN is
    false, so NaN starts no patch. Not differentiable.

    Args:
        entropies: [B, N] in nats, float32, float64, bfloat16 or float16.
        threshold: in nats; infinities are allowed. See `calibrate_threshold`.
        rule: "threshold", "monotonic" or "combined".
        delta: with "combined", the threshold of the difference, in nats; otherwise None.
        max_patch_length: a patch of more bytes is cut, from the left, into patches of this many and a rest. One that
            has reached it at the end of a sequence is finished.
        seq_lens: [B] int32 or int64: bytes of each row that are real (default N).
        cu_seqlens: [S+1] int32 or int64, B = 1: byte offsets of packed sequences, from 0; may end in repeats and
            before N.
        bos_patch: whether each sequence begins with a token, such as BOS, that is a patch by itself.
        capacity: C, the slots of a row; default N, which holds whatever comes. Where C is less than the patches,
            start j of sequence s of S in a row takes slot min(j, C - S + s): later patches merge, and `overflow` counts
            them.

    Returns:
        PatchLayout of B rows, N bytes and C slots. Bytes outside `seq_lens` or `cu_seqlens` belong to no patch.

    Raises:
        TypeError, ValueError: wrong argument; in particular a capacity below the number of sequences in a row.
        RuntimeError: seq_lens or cu_seqlens out of range or decreasing (CPU).
    """
    check_tensor("segment", "entropies", entropies, ndim=2, dtypes=FLOAT_DTYPES)
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
    options.check("segment", entropies, "entropies")
    return _segment(entropies, options)


def _segment(entropies: torch.Tensor, options: EntropyOptions) -> PatchLayout:
    if backend_for("segment", entropies.device) == "reference":
        return reference.segment(entropies, **options._asdict())
    return PatchLayout(*torch.ops.blt_kernels.segment(entropies.detach().float(), *options))


def segment_spaces(
    tokens: torch.Tensor,
    *,
    byte_offset: int = BYTE_OFFSET,
    max_patch_length: int | None = None,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bos_patch: bool = True,
    capacity: int | None = None,
) -> PatchLayout:
    """Cuts bytes into patches after the first of each run of space-like bytes.

    Byte Latent Transformer, section 2.2, after SpaceByte (arXiv 2404.14408). With u = token - byte_offset, a byte is
    space-like if it is no ASCII letter or digit and no UTF-8 continuation byte (0x80 .. 0xBF). Byte t + 1 of a sequence
    starts a patch if byte t is space-like and byte t - 1 is not, or if byte t is a special token (u < 0). Position 0
    always starts one, with `bos_patch` position 1 too.

    Args:
        tokens: [B, N] int32 or int64; `byte_offset` + byte, less for special tokens.
        byte_offset: the number of special tokens: 4 in published BLT, 0 for raw bytes.
        max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity: see `segment`.

    Returns, raises: as `segment`.
    """
    op = "segment_spaces"
    check_tensor(op, "tokens", tokens, ndim=2, dtypes=INT_DTYPES)
    check_int(op, "byte_offset", byte_offset, 0, 2**31 - 1)
    options = SegmentOptions(
        max_patch_length=max_patch_length,
        seq_lens=seq_lens,
        cu_seqlens=cu_seqlens,
        bos_patch=bos_patch,
        capacity=capacity,
    )
    options.check(op, tokens, "tokens")
    if backend_for(op, tokens.device) == "reference":
        return reference.segment_spaces(tokens, byte_offset=byte_offset, **options._asdict())
    return PatchLayout(*torch.ops.blt_kernels.segment_spaces(tokens.long(), byte_offset, *options))


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
    """Cuts every sequence into patches of `patch_size` bytes (MegaByte, arXiv 2305.07185); the last takes the rest.

    With `bos_patch` the first patch is one byte: lengths 1, p, p, ..., rest.

    Args:
        tokens: [B, N], only its shape and device are used.
        patch_size: bytes of a patch, at least 1.
        max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity: see `segment`.

    Returns, raises: as `segment`.
    """
    op = "segment_fixed"
    check_tensor(op, "tokens", tokens, ndim=2)
    check_int(op, "patch_size", patch_size, 1, 2**31 - 1)
    options = SegmentOptions(
        max_patch_length=max_patch_length,
        seq_lens=seq_lens,
        cu_seqlens=cu_seqlens,
        bos_patch=bos_patch,
        capacity=capacity,
    )
    options.check(op, tokens, "tokens")
    if backend_for(op, tokens.device) == "reference":
        return reference.segment_fixed(tokens, patch_size, **options._asdict())
    return PatchLayout(*torch.ops.blt_kernels.segment_fixed(tokens.detach(), patch_size, *options))


def calibrate_threshold(
    entropies: torch.Tensor,
    patch_size: float,
    *,
    rule: str = "threshold",
    delta: float | None = None,
    max_patch_length: int | None = None,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bos_patch: bool = True,
) -> float:
    """The threshold with which `segment` makes patches of `patch_size` bytes on average on these entropies.

    The mean is real bytes by patches, the forced patches counted. It rises with the threshold in steps; of the two
    steps around `patch_size` the nearer one is taken, and of the thresholds of that step the middle, so that small
    changes of the entropies move few boundaries. Syncs with the device.

    Args:
        entropies: [B, N], a sample of the corpus: 1e5 bytes fix the mean to about one per cent.
        patch_size: wanted mean length of a patch in bytes.
        rule, delta, max_patch_length, seq_lens, cu_seqlens, bos_patch: as `segment` will get them; with "combined",
            `delta` stays and the threshold is found.

    Returns:
        A number that fp32 represents exactly.

    Raises:
        TypeError, ValueError: wrong argument, no bytes, or a `patch_size` that no threshold reaches; the message then
            gives the range that can be reached.
    """
    op = "calibrate_threshold"
    check_tensor(op, "entropies", entropies, ndim=2, dtypes=FLOAT_DTYPES)
    options = EntropyOptions(
        max_patch_length=max_patch_length,
        seq_lens=seq_lens,
        cu_seqlens=cu_seqlens,
        bos_patch=bos_patch,
        capacity=None,
        threshold=0.0,
        rule=rule,
        delta=delta,
    )
    options.check(op, entropies, "entropies")
    check_real(op, "patch_size", patch_size)
    check_values(op, "entropies", entropies)
    e = entropies.detach().float()

    def cut(threshold: float) -> PatchLayout:
        return _segment(e, options._replace(threshold=threshold))

    def mean_length(threshold: float) -> float:
        return num_bytes / int(cut(threshold).num_patches.sum())

    num_bytes = int((cut(math.inf).patch_ids >= 0).sum())
    if num_bytes == 0:
        raise fail_value(op, "entropies", "at least one real byte", f"shape {tuple(entropies.shape)}")
    low, high = mean_length(-math.inf), mean_length(math.inf)
    if not low <= patch_size <= high:
        reach = f"a mean length that some threshold reaches here, {low:.6g} .. {high:.6g}"
        raise fail_value(op, "patch_size", reach, patch_size)

    # The mean changes only where the threshold passes one of the numbers that it is compared with. The numbers at
    # padding and at the starts of sequences are in the list too, and change nothing when the threshold passes them.
    compared = e.diff(dim=1) if rule == "monotonic" else e
    steps = compared[~compared.isnan()].unique()  # sorted
    # All thresholds in [steps[k], steps[k + 1]) make the same patches, and so do all below steps[0], for which k is -1.
    # The search finds the last k whose mean is at most patch_size.
    below, above = -1, len(steps)
    while above - below > 1:
        middle = (below + above) // 2
        if mean_length(float(steps[middle])) <= patch_size:
            below = middle
        else:
            above = middle
    if above < len(steps):
        lower, higher = mean_length(_inside(steps, below)), mean_length(_inside(steps, above))
        if higher - patch_size < patch_size - lower:
            below = above
    return _inside(steps, below)


def _inside(steps: torch.Tensor, k: int) -> float:
    """An fp32 number in [steps[k], steps[k + 1]), in the middle where both are there; k = -1: below steps[0]."""
    if not len(steps):
        return 0.0
    if k < 0:
        return float(torch.nextafter(steps[0], steps.new_tensor(-math.inf)))
    if k + 1 == len(steps):
        return float(steps[k])
    middle = ((steps[k].double() + steps[k + 1].double()) / 2).float()
    return float(middle if steps[k] <= middle < steps[k + 1] else steps[k])


@torch.library.register_fake("blt_kernels::segment")
def _(
    entropies: torch.Tensor,
    threshold: float,
    rule: str,
    delta: float | None,
    max_patch_length: int | None,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    bos_patch: bool,
    capacity: int | None,
) -> Fields:
    return fake_segmentation(entropies, cu_seqlens, capacity)


@torch.library.register_fake("blt_kernels::segment_spaces")
@torch.library.register_fake("blt_kernels::segment_fixed")
def _(
    tokens: torch.Tensor,
    byte_offset_or_patch_size: int,
    max_patch_length: int | None,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    bos_patch: bool,
    capacity: int | None,
) -> Fields:
    return fake_segmentation(tokens, cu_seqlens, capacity)
