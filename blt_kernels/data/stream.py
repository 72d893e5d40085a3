"""Documents of a corpus in a deterministic, shuffled, divided, endless and resumable order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from .._checks import check_int, fail_value
from .compression import COMPRESSED_CHUNK_BYTES, is_compressed
from .corpus import Address, Corpus, order_key
from .errors import CorpusError

STATE_VERSION = 3
OPEN_FILES = 32


class _Place(NamedTuple):
    """Where a queue of files is read."""

    file: int  # number in the queue
    cursor: int
    taken: int  # bytes of the file on disk


class _Position(NamedTuple):
    """Where reading goes on: JSON-able, and the same for every lane after as many draws."""

    epoch: int
    draws: int  # records read in this epoch
    documents: int  # in these, over all lanes
    places: tuple[_Place, ...]  # one for each queue


class DocumentStream:
    """An iterator over the documents (bytes, never empty) of `corpus`.

    Shuffled, the files of each epoch are dealt out to `open_files` queues. A queue reads its files one after the other,
    and the next record is of a queue that is drawn in proportion to the bytes that it still has to read. So the
    documents of files that are open at the same time come in a random order among each other, and all queues last until
    the end of the epoch: with no more files than queues, every part of an epoch is a mixture of all files. Documents
    are shuffled once more in blocks. What lies in one file far apart is not brought together.

    `state_dict()` is small and JSON-able. A stream made with equal arguments that loads it yields exactly the
    documents that this one would have yielded next. It reads the current block again, and goes on in each open file
    where it was: at once in text, at a group of rows in Parquet. JSON lines are counted from the start of the file, and
    a compressed file is decompressed from there.

    Args:
        corpus: what is read.
        seed: gives the order; the same seed and corpus give the same documents in every process.
        shuffle: True: as above, with a new order in each epoch. False: documents come in the corpus' own order, and
            only one record is in memory.
        epochs: how often to go through the corpus; None: endlessly.
        buffer_documents, buffer_bytes: a block ends with the record that brings it to this many documents or bytes. It
            is held in memory, and does not reach into the next epoch.
        open_files: files that are read at the same time. Each has its own decompressor (8 MiB for `xz -6`).
        lane, lanes: this stream yields every lanes-th document, from the lane-th, in the order of reading. The lanes of
            one seed have each document once an epoch between them. Every lane reads all files, so what is divided is
            the training and not the reading.

    Raises:
        TypeError, ValueError: wrong arguments.
        CorpusError: as the corpus raises it, and where an epoch has no document for this lane.
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
        open_files: int = OPEN_FILES,
        lane: int = 0,
        lanes: int = 1,
    ):
        if not isinstance(corpus, Corpus):
            raise TypeError(f"DocumentStream: corpus: expected a Corpus, got {type(corpus).__name__}")
        op = "DocumentStream"
        check_int(op, "seed", seed, -(2**63), 2**63 - 1)
        if epochs is not None:
            check_int(op, "epochs", epochs, 1)
        check_int(op, "buffer_documents", buffer_documents, 1)
        check_int(op, "buffer_bytes", buffer_bytes, 1)
        check_int(op, "open_files", open_files, 1)
        check_int(op, "lanes", lanes, 1)
        check_int(op, "lane", lane, 0)
        if lane >= lanes:
            raise fail_value(op, "lane", f"less than lanes = {lanes}", lane)
        self.corpus = corpus
        self.seed = seed
        self.shuffle = shuffle
        self.epochs = epochs
        self.buffer_documents = buffer_documents if shuffle else 1
        self.buffer_bytes = buffer_bytes
        self.lane = lane
        self.lanes = lanes
        self._num_queues = min(open_files, len(corpus.files)) if shuffle else 1
        self._identity = {
            "version": STATE_VERSION,
            "corpus": corpus.fingerprint(),
            "seed": seed,
            "shuffle": shuffle,
            "buffer_documents": self.buffer_documents,
            "buffer_bytes": buffer_bytes,
            "open_files": open_files,
            "lane": lane,
            "lanes": lanes,
        }
        self._go_to(self._beginning(0))

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while self._emitted == len(self._block):
            if self._end.epoch == self.epochs:
                raise StopIteration
            self._fill()
        self._emitted += 1
        return self._block[self._emitted - 1][1]

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the latest document."""
        return self._start.epoch

    @property
    def address(self) -> Address:
        """Where the latest document lies in the corpus; see Corpus.fetch."""
        return self._block[self._emitted - 1][0]

    def state_dict(self) -> dict[str, Any]:
        """The settings that `load_state_dict` compares, the position of the current block and the documents of it
        that were yielded."""
        epoch, draws, documents, places = self._start
        position = [epoch, draws, documents, [list(place) for place in places]]
        return {**self._identity, "position": position, "emitted": self._emitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken. Raises ValueError naming the first setting that differs (`epochs` may),
        or if the corpus no longer holds what it held."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise ValueError(f"DocumentStream.load_state_dict: {name}: expected {value!r}, got {state.get(name)!r}")
        epoch, draws, documents, places = state["position"]
        self._go_to(_Position(epoch, draws, documents, tuple(_Place(*place) for place in places)))
        if state["emitted"]:
            self._fill()
        if len(self._block) < state["emitted"]:
            raise ValueError(
                f"DocumentStream.load_state_dict: emitted: expected at most the {len(self._block)} documents of "
                f"the block, got {state['emitted']}: the corpus has changed"
            )
        self._emitted = state["emitted"]

    def _beginning(self, epoch: int) -> _Position:
        return _Position(epoch, 0, 0, (_Place(0, 0, 0),) * self._num_queues)

    def _go_to(self, position: _Position) -> None:
        self._start = self._end = position  # of the current block
        self._block: list[tuple[Address, bytes]] = []
        self._emitted = 0
        self._readers: dict[int, Iterator[tuple[int, list[bytes], int]]] = {}  # by queue
        self._set_queues(position.epoch)

    def _set_queues(self, epoch: int) -> None:
        """The files of each queue in an epoch, and the bytes of each of these and of all after it."""
        files = self.corpus.files
        order = list(range(len(files)))
        if self.shuffle:
            order.sort(key=lambda index: order_key(self.seed, epoch, "file", index))
        self._queues = [order[first :: self._num_queues] for first in range(self._num_queues)]
        self._sizes = [
            list(accumulate((files[index].size for index in reversed(queue)), initial=0))[::-1]
            for queue in self._queues
        ]

    def _left(self, queue: int, place: _Place) -> int:
        """About how many bytes of files a queue still has to read; 0 only after its last file."""
        files = self._queues[queue]
        if place.file == len(files):
            return 0
        in_buffer = COMPRESSED_CHUNK_BYTES if is_compressed(self.corpus.files[files[place.file]].path) else 1
        return max(0, self._sizes[queue][place.file] - place.taken) + in_buffer

    def _draw(self, epoch: int, draws: int, left: list[int]) -> int:
        """The queue that gives the next record, drawn in proportion to `left`."""
        ends = list(accumulate(left))
        drawn = int.from_bytes(order_key(self.seed, epoch, "record", draws), "little")
        return bisect_right(ends, drawn % ends[-1])

    def _fill(self) -> None:
        """Reads the next block; it may stay empty at the end of an epoch."""
        epoch, draws, documents, places = start = self._end
        at = list(places)
        left = [self._left(queue, place) for queue, place in enumerate(at)]
        block: list[tuple[Address, bytes]] = []
        size = 0
        while any(left) and len(block) < self.buffer_documents and size < self.buffer_bytes:
            queue = self._draw(epoch, draws, left)
            place = at[queue]
            index = self._queues[queue][place.file]
            if queue not in self._readers:
                self._readers[queue] = self.corpus.read(index, place.cursor)
            try:
                step = next(self._readers[queue], None)
            except Exception:
                self._readers.clear()  # a second try reads the block again, and fails again
                raise
            if step is None:
                del self._readers[queue]
                at[queue] = _Place(place.file + 1, 0, 0)
            else:
                cursor, pieces, taken = step
                for number, piece in enumerate(pieces, documents):
                    if number % self.lanes == self.lane:
                        block.append((Address(index, place.cursor, number - documents), piece))
                        size += len(piece)
                documents += len(pieces)
                at[queue] = _Place(place.file, cursor, taken)
            draws += 1
            left[queue] = self._left(queue, at[queue])
        end = _Position(epoch, draws, documents, tuple(at))
        if not any(left):
            self._check_documents(documents)
            end = self._beginning(epoch + 1)
            self._set_queues(epoch + 1)
        if self.shuffle:
            keys = [order_key(self.seed, epoch, "document", start.draws, i) for i in range(len(block))]
            block = [block[i] for i in sorted(range(len(block)), key=keys.__getitem__)]
        self._start, self._end = start, end
        self._block, self._emitted = block, 0

    def _check_documents(self, documents: int) -> None:
        """Refuses an epoch that has none for this lane: it would be read for ever."""
        if documents == 0:
            raise self.corpus.no_documents()
        if documents <= self.lane:
            raise CorpusError(
                f"DocumentStream: lanes: expected at most {documents}, the documents of {self.corpus.origin}, "
                f"got {self.lanes}: lane {self.lane} would have none",
                reason="empty",
            )
