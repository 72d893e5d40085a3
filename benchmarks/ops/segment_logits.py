"""segment_logits against its definition in PyTorch, eager and compiled, and against its two halves.

The goal is a fraction of copy where the logits come from memory. Where they lie in the caches, a copy is several times
faster and one exponential a logit is the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree

from blt_kernels import PatchLayout, calibrate_threshold, entropy, reference, segment, segment_logits
from blt_kernels.tokens import VOCAB_SIZE

from .cases import Case, Headline, Setting, forward_and_backward, in_report

PATCH_SIZES = (4.5, 6.0, 8.0)
HEADLINES: dict[str, Headline] = {"forward": "readme"}


def entropy_then_segment(logits: torch.Tensor, threshold: float) -> tuple[torch.Tensor, PatchLayout]:
    entropies = entropy(logits)
    return entropies, segment(entropies, threshold)


def cases(setting: Setting) -> Iterator[Case]:
    # On the CPU smaller logits lie in the caches: the largest size stands for the op, in the short list too.
    headline_bytes = 65536 if setting.scale == "cpu" else setting.headline_bytes
    for num_bytes in (headline_bytes,) if setting.quick and setting.scale == "cpu" else setting.sizes():
        chosen = HEADLINES if num_bytes == headline_bytes else None
        yield from in_report(cases_of(setting, num_bytes, PATCH_SIZES[0]), num_bytes, chosen)
        if not setting.quick:
            yield from entropy_cases(setting, num_bytes)
    for patch_size in () if setting.quick else PATCH_SIZES[1:]:
        yield from cases_of(setting, 16384, patch_size)


def entropy_cases(setting: Setting, num_bytes: int) -> Iterator[Case]:
    """The half of the op that has a backward pass: `entropy` alone."""
    logits = make_logits(setting, num_bytes)
    return forward_and_backward(
        {"op": "entropy", "B": 1, "N": num_bytes, "V": VOCAB_SIZE},
        {
            "ours": entropy,
            "reference": reference.entropy,
            "reference compiled": torch.compile(reference.entropy, dynamic=False),
        },
        (logits,),
        forward_bytes=logits.nbytes + 4 * num_bytes,
        backward_bytes=2 * logits.nbytes + 4 * num_bytes,
    )


def make_logits(setting: Setting, num_bytes: int) -> torch.Tensor:
    """From flat to peaked, as a model's are."""
    return setting.randn(1, num_bytes, VOCAB_SIZE) * (8 * torch.rand(1, num_bytes, 1)).to(setting.device, setting.dtype)


def cases_of(setting: Setting, num_bytes: int, patch_size: float) -> Iterator[Case]:
    logits = make_logits(setting, num_bytes)
    threshold = calibrate_threshold(entropy(logits), patch_size)

    def check() -> None:
        entropies, layout = segment_logits(logits, threshold)
        torch.testing.assert_close(entropies, reference.entropy(logits), rtol=2e-6, atol=2e-6)
        expected = pytree.tree_leaves(reference.segment(entropies, threshold))
        for ours, want in zip(pytree.tree_leaves(layout), expected, strict=True):
            torch.testing.assert_close(ours, want, rtol=0, atol=0)

    compiled = torch.compile(reference.segment_logits, dynamic=False)
    functions: dict[str, Callable[..., Any]] = {
        "ours": segment_logits,
        "entropy, then segment": entropy_then_segment,
        "reference": reference.segment_logits,
        "reference compiled": compiled,
    }
    outputs = pytree.tree_leaves(segment_logits(logits, threshold))
    yield Case(
        "forward",
        {"B": 1, "N": num_bytes, "V": VOCAB_SIZE, "patches": f"mean {patch_size:g}"},
        {name: partial(fn, logits, threshold) for name, fn in functions.items()},
        sum(tensor.nbytes for tensor in (logits, *outputs)),
        check,
    )
