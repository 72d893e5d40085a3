"""segment_logits against its definition in PyTorch, eager and compiled, and against its two halves.

The goal is a fraction of copy where the logits come from memory. At N = 4096 they lie in the caches, where a copy is
several times faster and one exponential a logit is the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.utils._pytree as pytree
from harness import Case, main

from blt_kernels import PatchLayout, calibrate_threshold, entropy, reference, segment, segment_logits

VOCAB = 260
PATCH_SIZE = 4.5
NUM_BYTES = (4096, 16384, 65536)


def entropy_then_segment(logits: torch.Tensor, threshold: float) -> tuple[torch.Tensor, PatchLayout]:
    entropies = entropy(logits)
    return entropies, segment(entropies, threshold)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    compiled = torch.compile(reference.segment_logits, dynamic=False)
    compiled_entropy = torch.compile(reference.entropy, dynamic=False)
    for num_bytes in NUM_BYTES:
        logits = torch.randn(1, num_bytes, VOCAB) * (8 * torch.rand(1, num_bytes, 1))
        threshold = calibrate_threshold(entropy(logits), PATCH_SIZE)
        shapes = {"B": 1, "N": num_bytes, "V": VOCAB}

        def check(logits: torch.Tensor = logits, threshold: float = threshold) -> None:
            entropies, layout = segment_logits(logits, threshold)
            torch.testing.assert_close(entropies, reference.entropy(logits), rtol=2e-6, atol=2e-6)
            for ours, want in zip(
                pytree.tree_leaves(layout), pytree.tree_leaves(reference.segment(entropies, threshold)), strict=True
            ):
                torch.testing.assert_close(ours, want, rtol=0, atol=0)

        outputs = pytree.tree_leaves(segment_logits(logits, threshold))
        yield Case(
            "segment_logits",
            shapes,
            {
                "ours": partial(segment_logits, logits, threshold),
                "entropy, then segment": partial(entropy_then_segment, logits, threshold),
                "eager": partial(reference.segment_logits, logits, threshold),
                "compiled": partial(compiled, logits, threshold),
            },
            sum(t.numel() * t.element_size() for t in (logits, *outputs)),
            check,
        )
        yield Case(
            "entropy",
            shapes,
            {
                "ours": partial(entropy, logits),
                "eager": partial(reference.entropy, logits),
                "compiled": partial(compiled_entropy, logits),
            },
            (logits.numel() + num_bytes) * logits.element_size(),
        )


if __name__ == "__main__":
    main("segment_logits", cases)
