"""Where the time of a training step goes: of a BLT and of the token model, part by part, forward and backward.

Parts are ranges of torch's profiler around modules and functions of the model; the innermost one counts. What backward
computes belongs to the part whose forward pass made its node of the graph, which both know by a number.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from blt_kernels.model import blt, decoder, encoder, entropy_model, transformer
from blt_kernels.nn import DecoderCrossAttention, EncoderCrossAttention, HashNgramEmbedding
from blt_kernels.training import step
from blt_kernels.training.optim import Optimizers

from .jobs import Job
from .models import TOKEN
from .speed import BATCHES, WARM_UP, Subject, medians

if TYPE_CHECKING:
    from .run import Bench

PREFIX = "part: "
OTHER = "the rest"
_BACKWARD = "autograd::engine::evaluate_function"  # begins the name of what runs a node of the graph


def _products(layer: nn.Linear, *_: Any) -> str:
    return f"products of width {min(layer.in_features, layer.out_features)}"


def _attention(q: Any, k: Any, v: Any, plan: transformer.AttentionPlan) -> str:
    return "attention over bytes, in windows" if plan.block else "attention over patches or tokens"


# Owner, attribute, and the part that a call of it is; a function of the call's arguments where that depends on them.
CALLS: tuple[tuple[Any, str, str | Callable[..., str]], ...] = (
    (nn.Linear, "forward", _products),
    (nn.RMSNorm, "forward", "norms"),
    (transformer, "rotate", "rotary positions"),
    (transformer, "attend", _attention),
    (transformer.FeedForward, "forward", "SwiGLU, without products"),
    (transformer.TransformerLayer, "forward", "residuals"),
    *((module, "plan_attention", "positions and masks") for module in (blt, decoder, encoder, entropy_model)),
    *((module, "next_byte_loss", "loss") for module in (blt, entropy_model)),
    *((module, "forward", "cross-attention") for module in (EncoderCrossAttention, DecoderCrossAttention)),
    (HashNgramEmbedding, "forward", "hash embedding"),
    (step, "layout_of", "layout"),
    (Optimizers, "step", "clipping and optimisers"),
)


def profile_steps(bench: Bench, job: Job) -> None:
    """Profiles training steps of a BLT and of the token model."""
    subjects = [Subject(bench, name, bench.sizes[job.size]) for name in (job.model, TOKEN)]
    seconds = medians([subject.train for subject in subjects], bench.device, bench.scale.throughput_seconds, BATCHES)
    measured = {
        name: parts_of(subject.train) | {"seconds": median}
        for name, subject, median in zip(("blt", "token"), subjects, seconds, strict=True)
    }
    ours = subjects[0]
    bench.finish(job, bench.record(job, ours.built, ours.model) | {"measured": measured})


def parts_of(call: Callable[[], Any]) -> dict[str, Any]:
    """`parts`, seconds of a call by part, and `flops_per_second` of those parts that are products."""
    activities = [ProfilerActivity.CPU]
    with recorded():
        for _ in range(WARM_UP):
            call()
        with profile(activities=activities, record_shapes=True, with_flops=True) as profiler:
            for _ in range(BATCHES):
                call()
    seconds: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    events = profiler.events() or []
    part_of = parts_by_event(events)
    for event in events:
        seconds[part_of(event)] += event.self_cpu_time_total / 1e6 / BATCHES
        flops[part_of(event)] += (event.flops or 0) / BATCHES
    rates = {part: flops[part] / seconds[part] for part in seconds if part.startswith("products")}
    return {"parts": dict(seconds), "flops_per_second": rates}


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Records every call of CALLS as a range of the profiler."""

    def recording(function: Callable[..., Any], part: str | Callable[..., str]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            name = part if isinstance(part, str) else part(*arguments, **named)
            with record_function(PREFIX + name):
                return function(*arguments, **named)

        return call

    with contextlib.ExitStack() as stack:
        for owner, attribute, part in CALLS:
            stack.enter_context(patch.object(owner, attribute, recording(getattr(owner, attribute), part)))
        yield


def parts_by_event(events: list[FunctionEvent]) -> Callable[[FunctionEvent], str]:
    """A function from an event to its part."""

    def above(event: FunctionEvent) -> Iterator[FunctionEvent]:
        upper: FunctionEvent | None = event
        while upper is not None:
            yield upper
            upper = upper.cpu_parent

    def forward_part(event: FunctionEvent) -> str | None:
        names = (upper.name for upper in above(event) if upper.name.startswith(PREFIX))
        return next((name.removeprefix(PREFIX) for name in names), None)

    # Of the events with one number, the last to begin is the operator that made the node.
    nodes: dict[int, str | None] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not any(upper.name.startswith(_BACKWARD) for upper in above(event)):
            nodes[event.sequence_nr] = forward_part(event)

    def part(event: FunctionEvent) -> str:
        backward = next((upper for upper in above(event) if upper.name.startswith(_BACKWARD)), None)
        found = forward_part(event) if backward is None else nodes.get(backward.sequence_nr)
        return found or OTHER

    return part
