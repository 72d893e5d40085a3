"""linear_entropy against F.linear followed by an entropy: the reference, eager and compiled, and our own.

These keep all logits in memory; "ours" never does, and computes them a second time in its backward. In bf16 the
library rounds its logits to bf16, ours stay fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from blt_kernels import entropy, linear_entropy, reference
from blt_kernels.tokens import VOCAB_SIZE

from .cases import Case, Headline, Setting, forward_and_backward, in_report

HEADLINES: dict[str, Headline] = {"forward": "results", "backward": "results"}


def linear_then(fn: Callable[..., torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return fn(F.linear(hidden, weight))


def cases(setting: Setting) -> Iterator[Case]:
    headline_rows = 64 if setting.scale == "tiny" else 4096
    yield from in_report(cases_of(setting, headline_rows, 768, setting.dtype), headline_rows, HEADLINES)
    if setting.quick:
        return
    for rows in (1, 256, 16384):
        yield from in_report(cases_of(setting, rows, 768, setting.dtype), rows, None)
    yield from cases_of(setting, 4096, 1024, setting.dtype)
    if setting.dtype == torch.float32:
        for rows in (256, 4096):
            yield from cases_of(setting, rows, 768, torch.bfloat16)


def cases_of(setting: Setting, rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    hidden = setting.randn(rows, width).to(dtype)
    weight = (setting.randn(VOCAB_SIZE, width) * 3 * width**-0.5).to(dtype)
    size = hidden.nbytes + weight.nbytes + 4 * rows
    yield from forward_and_backward(
        {"rows": rows, "D": width, "V": VOCAB_SIZE, "dtype": str(dtype).removeprefix("torch.")},
        {
            "ours": linear_entropy,
            "F.linear, our entropy": partial(linear_then, entropy),
            "reference": partial(linear_then, reference.entropy),
            "reference compiled": torch.compile(partial(linear_then, reference.entropy), dynamic=False),
        },
        (hidden, weight),
        forward_bytes=size,
        backward_bytes=2 * size,
    )
