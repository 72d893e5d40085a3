"""What the benchmark of an op is made of.

`benchmarks/ops/<op>.py` is a module with a generator of cases:

    def cases(setting: Setting) -> Iterator[Case]:
        x = setting.randn(1, 4096, 1024)
        yield Case(
            name="forward",                                  # with the shapes, unique within the module
            shapes={"N": 4096, "D": 1024},                   # whatever says what was run
            variants={"ours": lambda: op(x), "reference": lambda: reference.op(x)},
            bytes=...,                                       # each input read once + each output written once
            check=lambda: torch.testing.assert_close(op(x), reference.op(x)),
        )

A case is built, checked, timed and dropped before the next one is built, because its closures hold its tensors.
Variants are called without arguments; the first is the op under test.

An op declares in the same module which of its cases the report shows: `in_report` marks them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch

# Where a case that stands for its op is shown. "results": in the tables and plots of docs/results.md; "readme": in the
# table of README.md as well; "top": in the first lines of README.md as well.
Headline = Literal["results", "readme", "top"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how much: the device, the dtype (fp32 on the CPU, bf16 on a GPU), and whether only the short list.

    `tiny` is a rehearsal of the GPU's cases on the CPU, in sizes of a moment: its times say nothing.
    """

    device: torch.device
    quick: bool = False
    tiny: bool = False

    @property
    def scale(self) -> Literal["cpu", "cuda", "tiny"]:
        """What the sizes are chosen for."""
        return "tiny" if self.tiny else "cuda" if self.device.type == "cuda" else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.scale == "cpu" else torch.bfloat16

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    @property
    def headline_bytes(self) -> int:
        """Bytes of text in a row of the headline cases. On a GPU they move a gigabyte."""
        return {"cpu": 16384, "cuda": 1 << 19, "tiny": 512}[self.scale]

    def sizes(self) -> tuple[int, ...]:
        """Bytes of text in a row: the sweep over N."""
        sizes = {"cpu": (1024, 4096, 16384, 65536), "cuda": (1024, 4096, 16384, 65536, 1 << 19), "tiny": (256, 512)}
        if not self.quick:
            return sizes[self.scale]
        return (self.headline_bytes,) if self.scale == "cpu" else sizes[self.scale][-2:]


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement of an op and of what stands beside it.

    Attributes:
        name: such as "forward"; with `shapes` unique within the op.
        variants: what is timed, by name. The first is the op under test.
        bytes: each input read once and each output written once.
        check: raises where the variants' results differ.
        graph: on a GPU, replay a CUDA graph; False for what waits for the device.
        headline: where the report shows it as standing for the op; None: nowhere.
        sweep: if the case is a point of the sweep over sizes, in which the other shapes are those of the headline
            cases, its size: bytes of text, or of an optimiser's update the rows that the gradient lists. Else None.
    """

    name: str
    shapes: dict[str, Any]
    variants: dict[str, Callable[[], Any]]
    bytes: int
    check: Callable[[], None] | None = None
    graph: bool = True
    headline: Headline | None = None
    sweep: int | None = None

    @property
    def label(self) -> str:
        return label(self.name, self.shapes)


def label(name: str, shapes: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in shapes.items())])


def in_report(cases: Iterable[Case], size: int, headlines: Mapping[str, Headline] | None) -> Iterator[Case]:
    """Marks `cases` as points of the sweep over sizes.

    Args:
        size: see `Case.sweep`.
        headlines: by name of a case, where it is shown as standing for the op; None at the other sizes of the sweep.

    Raises:
        ValueError: at the end, when `headlines` names a case that was not among `cases`.
    """
    missing = dict(headlines or {})
    for case in cases:
        yield dataclasses.replace(case, sweep=size, headline=missing.pop(case.name, None))
        del case  # before the next one is built: it holds tensors
    if missing:
        raise ValueError(f"in_report: headlines: no case is named {' or '.join(map(repr, missing))}")


def forward_and_backward(
    shapes: dict[str, Any],
    functions: dict[str, Callable[..., torch.Tensor]],
    inputs: tuple[torch.Tensor, ...],
    *,
    forward_bytes: int,
    backward_bytes: int,
    forward_only: tuple[str, ...] = (),
    comparable: torch.Tensor | None = None,
) -> Iterator[Case]:
    """The two cases of an op: its result without a graph, and the gradients of all `inputs` with the graph built.

    Args:
        functions: of `inputs`; the first is the op under test, against which the others' results are checked. NaN in
            theirs counts as 0: that is what a softmax over nothing is under a dense mask.
        forward_only: the functions without a backward pass that could be compared.
        comparable: bool, of the shape of the first input: where its gradients must agree; None: everywhere.
    """

    def forward(fn: Callable[..., torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return fn(*inputs)

    def check_forward() -> None:
        ours, *others = (forward(fn) for fn in functions.values())
        for other in others:
            assert_close(ours, other.nan_to_num(0), inputs)

    variants: dict[str, Callable[[], Any]] = {name: partial(forward, fn) for name, fn in functions.items()}
    yield Case("forward", shapes, variants, forward_bytes, check_forward)

    leaves = [x.requires_grad_() for x in inputs]
    outputs = {name: fn(*leaves) for name, fn in functions.items() if name not in forward_only}
    grad = torch.randn_like(next(iter(outputs.values())))

    def backward(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def check_backward() -> None:
        ours, *others = (backward(out) for out in outputs.values())
        for other in others:
            for i, (a, b) in enumerate(zip(ours, other, strict=True)):
                where = slice(None) if comparable is None or i > 0 else comparable
                assert_close(a[where], b.nan_to_num(0)[where], inputs)

    variants = {name: partial(backward, out) for name, out in outputs.items()}
    yield Case("backward", shapes, variants, backward_bytes, check_backward)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, inputs: Iterable[torch.Tensor]) -> None:
    """For results that were added up in another order: entry by entry, with narrow `inputs` by their norms."""
    narrow = [x.dtype for x in inputs if x.dtype in (torch.bfloat16, torch.float16)]
    if not narrow:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        return
    error = torch.linalg.vector_norm(ours.float() - theirs.float())
    allowed = 0.05 * torch.linalg.vector_norm(theirs.float()) + 1e-3 * ours.numel() ** 0.5  # all may be 0
    assert error <= allowed, f"error {error:.3g} against a baseline in {narrow[0]}, at most {allowed:.3g} allowed"
