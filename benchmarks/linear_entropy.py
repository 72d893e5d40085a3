"""linear_entropy against F.linear followed by an entropy: the reference, eager and compiled, and our own.

These keep all logits in memory; "ours" never does, and computes them a second time in its backward. In bf16 the
library rounds its logits to bf16, ours stay fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, main

from blt_kernels import entropy, linear_entropy, reference

VOCAB = 260
SHAPES = [(1, 768), (256, 768), (4096, 768), (4096, 1024)]  # rows, D


def linear_then(fn: Callable, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return fn(F.linear(hidden, weight))


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    compiled = torch.compile(partial(linear_then, reference.entropy), dynamic=False)
    functions = {
        "ours": linear_entropy,
        "F.linear, our entropy": partial(linear_then, entropy),
        "eager": partial(linear_then, reference.entropy),
        "compiled": compiled,
    }
    for dtype in (torch.float32, torch.bfloat16):
        for rows, width in SHAPES:
            hidden = torch.randn(rows, width).to(dtype).requires_grad_()
            weight = (torch.randn(VOCAB, width) * 3 * width**-0.5).to(dtype).requires_grad_()
            grad = torch.randn(rows)
            shapes = {"rows": rows, "D": width, "V": VOCAB}
            size = (hidden.numel() + weight.numel()) * hidden.element_size() + rows * 4

            def forward(fn: Callable, hidden: torch.Tensor = hidden, weight: torch.Tensor = weight) -> torch.Tensor:
                with torch.no_grad():
                    return fn(hidden, weight)

            def both(
                fn: Callable,
                hidden: torch.Tensor = hidden,
                weight: torch.Tensor = weight,
                grad: torch.Tensor = grad,
            ) -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(fn(hidden, weight), (hidden, weight), grad)

            def check(hidden: torch.Tensor = hidden, weight: torch.Tensor = weight) -> None:
                want = reference.linear_entropy(hidden, weight)
                torch.testing.assert_close(linear_entropy(hidden, weight), want, rtol=1e-5, atol=1e-5)

            name = str(dtype).removeprefix("torch.")
            for case, call, bytes_moved in (("forward", forward, size), ("both", both, 3 * size)):
                variants = {variant: partial(call, fn) for variant, fn in functions.items()}
                yield Case(f"{case} {name}", shapes, variants, bytes_moved, check)


if __name__ == "__main__":
    main("linear_entropy", cases)
