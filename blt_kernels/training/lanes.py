"""The lanes of a global batch: loaders side by side, one of which gives each batch of a step."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from typing import Any

from ..data import Batch, Corpus, DocumentStream, PackedBatches
from ..data.stream import OPEN_FILES
from .patcher import Patcher
from .rows import RowShape

OTHER_FILES = 1024  # that a process may have open beside the text; also the usual limit for all of them


class Lanes:
    """An iterator over the batches of a step, one of each lane: a list of Batch.

    The global batch of a run has G lanes, and each is a loader with open documents of its own. One process runs them
    one after the other and accumulates their gradients; R ranks run G / R each. So what is trained does not depend on
    R.

    Args:
        loaders: the lanes that this process runs.
    """

    def __init__(self, loaders: Sequence[PackedBatches]):
        self.loaders = list(loaders)

    @staticmethod
    def over(
        corpus: Corpus, shape: RowShape, patcher: Patcher | None, *, seed: int, num_lanes: int, mine: range
    ) -> Lanes:
        """The lanes `mine` of `num_lanes` G over the documents of `corpus`.

        Lane g takes the documents at positions g, g + G, g + 2G, ... of the shuffled order of reading, so that no two
        lanes read a document of an epoch twice. Each reads all files, because only the reading shows where a document
        begins. One lane takes every document. The process is allowed as many open files as that takes.
        """
        _allow_open_files(len(mine) * min(OPEN_FILES, len(corpus.files)))
        return Lanes(
            [shape.batches(DocumentStream(corpus, seed=seed, lane=lane, lanes=num_lanes), patcher) for lane in mine]
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        return [next(loader) for loader in self.loaders]

    def state_dict(self) -> list[dict[str, Any]]:
        """The states of the loaders, in their order; see `PackedBatches.state_dict`."""
        return [loader.state_dict() for loader in self.loaders]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Goes to where `states` was taken; raises ValueError as `PackedBatches.load_state_dict` does."""
        for loader, state in zip(self.loaders, states, strict=True):
            loader.load_state_dict(state)


def _allow_open_files(number: int) -> None:
    """Raises the limit of open files of this process so that `number` can be text, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OTHER_FILES + number
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
