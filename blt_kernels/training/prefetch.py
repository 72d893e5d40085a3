"""Batches made one ahead of the training step."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..data import Batch, PackedBatches


def prefetch(batches: PackedBatches, *, ahead: bool) -> Generator[tuple[Batch, dict[str, Any]]]:
    """Yields each batch with the loader's state right after it, so that a checkpoint does not count a batch ahead.

    Args:
        ahead: a thread makes the next batch while the caller uses this one. This is for training on a GPU, where the
            loader cuts patches on the CPU beside the step. On the CPU both need the same cores, and two teams of OpenMP
            threads, each of which spins while it waits, run many times slower than one after the other. There the next
            batch is made when it is asked for.
    """

    def make() -> tuple[Batch, dict[str, Any]] | None:
        batch = next(batches, None)
        return None if batch is None else (batch, batches.state_dict())

    if not ahead:
        yield from iter(make, None)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(make)
        while (made := coming.result()) is not None:
            coming = thread.submit(make)
            yield made
