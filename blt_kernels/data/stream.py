"""Documents of a corpus in a deterministic, shuffled, sharded, endless and resumable order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .._checks import check_int, fail_value
from .corpus import Corpus, order_key
from .errors import CorpusError

STATE_VERSION = 2


class _Position(NamedTuple):
    """Where reading goes on: JSON-able, and the same for every rank up to `cursor`."""

    epoch: int
    rank_in_order: int  # of the file, in this epoch's order
    cursor: int  # in the file
    document: int  # how many documents of the epoch came before, over all ranks


class DocumentStream:
    """An iterator over the documents (bytes, never empty) of `corpus`.

    `state_dict()` is small and JSON-able. A stream made with equal arguments that loads it yields exactly the
    documents that this one would have yielded next; it reads the current block again.

    Args:
        corpus: what is read.
        seed: gives the order; the same seed and corpus give the same documents in every process.
        shuffle: True: each epoch has a new order of files, and the documents that are read are shuffled in blocks.
            False: documents come in the corpus' own order, and only one record is in memory.
        epochs: how often to go through the corpus; None: endlessly.
        buffer_documents, buffer_bytes: a block ends with the record that brings it to this many documents or bytes. It
            is held in memory, and does not reach into the next epoch.
        rank, world_size: this stream yields every world_size-th document, from the rank-th, in the order of reading.
            Every rank reads all files, so what is divided is the training and not the reading.

    Raises:
        TypeError, ValueError: wrong arguments.
        CorpusError: as the corpus raises it, and where an epoch has no document for this rank.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        buffer_documents: int = 1024,
        buffer_bytes: int = 16 << 20,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not isinstance(corpus, Corpus):
            raise TypeError(f"DocumentStream: corpus: expected a Corpus, got {type(corpus).__name__}")
        op = "DocumentStream"
        check_int(op, "seed", seed, -(2**63), 2**63 - 1)
        if epochs is not None:
            check_int(op, "epochs", epochs, 1)
        check_int(op, "buffer_documents", buffer_documents, 1)
        check_int(op, "buffer_bytes", buffer_bytes, 1)
        check_int(op, "world_size", world_size, 1)
        check_int(op, "rank", rank, 0)
        if rank >= world_size:
            raise fail_value(op, "rank", f"less than world_size = {world_size}", rank)
        self.corpus = corpus
        self.seed = seed
        self.shuffle = shuffle
        self.epochs = epochs
        self.buffer_documents = buffer_documents if shuffle else 1
        self.buffer_bytes = buffer_bytes
        self.rank = rank
        self.world_size = world_size
        self._identity = {
            "version": STATE_VERSION,
            "corpus": corpus.fingerprint(),
            "seed": seed,
            "shuffle": shuffle,
            "buffer_documents": self.buffer_documents,
            "buffer_bytes": buffer_bytes,
            "rank": rank,
            "world_size": world_size,
        }
        self._go_to(_Position(0, 0, 0, 0))

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while self._emitted == len(self._block):
            if self._end.epoch == self.epochs:
                raise StopIteration
            self._fill()
        self._emitted += 1
        return self._block[self._emitted - 1]

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the latest document."""
        return self._start.epoch

    def state_dict(self) -> dict[str, Any]:
        """The settings that `load_state_dict` compares, the position of the current block and the documents of it
        that were yielded."""
        return {**self._identity, "position": list(self._start), "emitted": self._emitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken. Raises ValueError naming the first setting that differs (`epochs` may),
        or if the corpus no longer holds what it held."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise ValueError(f"DocumentStream.load_state_dict: {name}: expected {value!r}, got {state.get(name)!r}")
        position = _Position(*state["position"])
        if position != self._start or not self._block:  # else the block is at hand
            self._go_to(position)
        if state["emitted"] and not self._block:
            self._fill()
        if len(self._block) < state["emitted"]:
            raise ValueError(
                f"DocumentStream.load_state_dict: emitted: expected at most the {len(self._block)} documents of "
                f"the block, got {state['emitted']}: the corpus has changed"
            )
        self._emitted = state["emitted"]

    def _go_to(self, position: _Position) -> None:
        self._start = self._end = position  # of the current block
        self._block: list[bytes] = []
        self._emitted = 0
        self._records: Iterator[tuple[int, list[bytes]]] | None = None
        self._order: list[int] = []

    def _file_order(self, epoch: int) -> list[int]:
        order = list(range(len(self.corpus.files)))
        return sorted(order, key=lambda index: order_key(self.seed, epoch, "file", index)) if self.shuffle else order

    def _fill(self) -> None:
        """Reads the next block; it may stay empty at the end of an epoch."""
        epoch, place, cursor, document = start = self._end
        block: list[bytes] = []
        size = 0
        order = self._order = self._order or self._file_order(epoch)
        while place < len(order) and len(block) < self.buffer_documents and size < self.buffer_bytes:
            if self._records is None:
                self._records = self.corpus.read(order[place], cursor)
            try:
                step = next(self._records, None)
            except Exception:
                self._records = None  # a second try reads the block again, and fails again
                raise
            if step is None:
                self._records = None
                place, cursor = place + 1, 0
                continue
            cursor, documents = step
            mine = documents[(self.rank - document) % self.world_size :: self.world_size]
            document += len(documents)
            block += mine
            size += sum(map(len, mine))
        end = _Position(epoch, place, cursor, document)
        if place == len(order):
            if document == 0:
                raise self.corpus.no_documents()
            if document <= self.rank:
                raise CorpusError(
                    f"DocumentStream: world_size: expected at most {document}, the documents of {self.corpus.origin}, "
                    f"got {self.world_size}: rank {self.rank} would have none",
                    reason="empty",
                )
            self._order = []
            end = _Position(epoch + 1, 0, 0, 0)
        if self.shuffle:
            keys = [order_key(self.seed, epoch, "document", start.document, i) for i in range(len(block))]
            block = [block[i] for i in sorted(range(len(block)), key=keys.__getitem__)]
        self._start, self._end = start, end
        self._block, self._emitted = block, 0
