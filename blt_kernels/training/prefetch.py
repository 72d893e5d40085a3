"""Batches made one step ahead of the training step."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..data import Batch
from .lanes import Lanes

Made = tuple[list[Batch], list[dict[str, Any]]]


def prefetch(lanes: Lanes, *, ahead: bool, device: torch.device | None = None) -> Generator[Made]:
    """Yields the batches of each step with the states of the lanes right after them, so that a checkpoint counts no
    batch ahead.

    Args:
        ahead: a thread makes the next batches while the caller uses these. This is for training on a GPU, where the
            loader reads text, cuts patches and packs rows beside the step. On the CPU both need the same cores, and two
            teams of OpenMP threads, each of which spins while it waits, run many times slower than one after the other.
            There the next batches are made when they are asked for.
        device: where the step runs. On CUDA the thread has a stream of its own, so that the entropy model does not wait
            for the step, nor the step for it. This is safe: all that the thread makes on the device it makes, reads and
            frees on its stream, batches are arrays of the host, and the weights of the entropy model, which are all
            that it shares, are frozen.
    """

    def make() -> Made | None:
        batches = next(lanes, None)
        return None if batches is None else (batches, lanes.state_dict())

    if not ahead:
        yield from iter(make, None)
        return
    stream = None
    if device is not None and device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # the weights were put there

    def make_on_stream() -> Made | None:
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            return make()

    # The first step may compile the model. While it does, torch tells every thread that it is being compiled, and the
    # entropy model would compute its rotations by other operations, which round otherwise. So reading ahead starts with
    # the second step.
    first = make()
    if first is None:
        return
    yield first
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(make_on_stream)
        while (made := coming.result()) is not None:
            coming = thread.submit(make_on_stream)
            yield made
