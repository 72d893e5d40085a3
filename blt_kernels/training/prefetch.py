"""Batches made one ahead of the training step."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..data import Batch
from .lanes import Lanes


def prefetch(lanes: Lanes, *, ahead: bool) -> Generator[tuple[list[Batch], list[dict[str, Any]]]]:
    """Yields the batches of each step with the states of the lanes right after them, so that a checkpoint counts no
    batch ahead.

    Args:
        ahead: a thread makes the next batches while the caller uses these. This is for training on a GPU, where the
            loader cuts patches on the CPU beside the step. On the CPU both need the same cores, and two teams of OpenMP
            threads, each of which spins while it waits, run many times slower than one after the other. There the next
            batches are made when they are asked for.
    """

    def make() -> tuple[list[Batch], list[dict[str, Any]]] | None:
        batches = next(lanes, None)
        return None if batches is None else (batches, lanes.state_dict())

    if not ahead:
        yield from iter(make, None)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(make)
        while (made := coming.result()) is not None:
            coming = thread.submit(make)
            yield made
