"""Documents packed into rows of a fixed shape: by tokens, or by patches (constant capacity)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._checks import check_int
from ..tokens import IGNORE_INDEX, PAD_ID
from .stream import DocumentStream
from .tokens import ByteTokenizer, Tokenizer

STATE_VERSION = 3

Segmenter = Callable[[NDArray[np.int64]], Any]


@dataclass(frozen=True)
class Batch:
    """B rows of N tokens. A *sequence* is a document or a part of one that lies in one row without a break; nothing
    may be attended to, hashed or patched across sequences. A row holds at most S sequences, then padding.

    Attributes:
        tokens: int64 [B, N]; PAD_ID after the last sequence.
        targets: int64 [B, N]: the next token of the same document, also where that is in another sequence;
            IGNORE_INDEX at EOS and padding. So every token of a document but its BOS is a target exactly once.
        sequence_ids: int32 [B, N]: 0, 1, ... in each row; -1 at padding.
        seq_lens: int32 [B]: tokens before the padding.
        cu_seqlens: int32 [B, S+1]: where the sequences of each row start and end; repeats its last value, seq_lens[b].
            With B = 1, cu_seqlens[0] is that of a packed batch.
        patch_lengths: int64 [B, C]: tokens of each patch; 0 after the last; sums to seq_lens. None without a segmenter.
        next_is_start: bool [B, S]: whether the document goes on in another sequence. That one begins with a new patch,
            so the last patch of this one is finished. None without a segmenter.
        num_bytes: bytes of text that the targets stand for; BOS, EOS and padding stand for none.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    sequence_ids: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    patch_lengths: NDArray[np.int64] | None = None
    next_is_start: NDArray[np.bool_] | None = None
    num_bytes: int = 0


@dataclass
class _OpenDocument:
    """A document of which some tokens are still to be put into rows."""

    begin: dict[str, Any]  # state of the stream before the document
    tokens: NDArray[np.int64]
    ends: NDArray[np.int64]  # of its patches
    offset: int = 0  # tokens that are in rows

    @property
    def left(self) -> int:
        return len(self.tokens) - self.offset


class PackedBatches:
    """An iterator of Batch: each document of `documents` as BOS, bytes, EOS, packed back to back into rows.

    It ends when `documents` does; the last rows may be short or empty, but the shape stays.

    `state_dict()` is JSON-able and small. To read ahead of training, keep for each batch the state taken right after
    it was made. Loading reads and segments the current document again, so it is exact for a segmenter that repeats
    itself.

    Args:
        documents: what is packed.
        row_tokens: N. Rows are filled one after the other; a document that does not fit goes on in a later row.
        batch_size: B.
        segmenter: called with the tokens of a whole document, int64 [n]; returns the lengths of its patches, integers
            of at least 1 that sum to n, as an array or sequence.
        row_patches: C, with a segmenter. A row ends when it holds C patches, or where the next one would go beyond N,
            so that cuts are at patch boundaries. With N about 1.3 * C * mean length nearly all slots are used, and
            what varies is the padding. A patch of more than N tokens is cut into N, N, ..., rest.
        max_sequences: S. A row that holds S sequences ends there. None: N / 128, at least 16; at most C.
        interleave: how many documents are open at a time, each giving a sequence in turn. Sequences of one document
            are alike, and a batch of them gives a noisy gradient. None: B, so that each row of a batch of long
            documents is from another one.
        tokenizer: makes the tokens of a document. None: a ByteTokenizer.

    Raises:
        TypeError, ValueError: wrong arguments or wrong patch lengths.
    """

    def __init__(
        self,
        documents: DocumentStream,
        row_tokens: int,
        batch_size: int = 1,
        *,
        segmenter: Segmenter | None = None,
        row_patches: int | None = None,
        max_sequences: int | None = None,
        interleave: int | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        if not isinstance(documents, DocumentStream):
            raise TypeError(f"PackedBatches: documents: expected a DocumentStream, got {type(documents).__name__}")
        if (segmenter is None) != (row_patches is None):
            raise ValueError("PackedBatches: row_patches: expected together with segmenter, got one of them")
        sizes = {"row_tokens": row_tokens, "batch_size": batch_size}
        optional = {"row_patches": row_patches, "max_sequences": max_sequences, "interleave": interleave}
        for name, value in {**sizes, **{name: value for name, value in optional.items() if value is not None}}.items():
            check_int("PackedBatches", name, value, 1)
        self.documents = documents
        self.row_tokens = row_tokens
        self.batch_size = batch_size
        self.segmenter = segmenter
        self.tokenizer = tokenizer or ByteTokenizer()
        self.row_patches = row_patches
        # Without a segmenter every token is a patch, and the same cutting serves.
        self._capacity = row_patches or row_tokens
        self.max_sequences = max_sequences or min(max(16, row_tokens // 128), self._capacity)
        self._open: list[_OpenDocument | None] = [None] * (interleave or batch_size)
        self._settings = {
            "version": STATE_VERSION,
            "row_tokens": row_tokens,
            "batch_size": batch_size,
            "row_patches": row_patches,
            "max_sequences": self.max_sequences,
            "interleave": len(self._open),
        }
        self._turn = 0  # index of the open document that gives the next sequence

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._next_open() is None:
            raise StopIteration
        shape, sequences = (self.batch_size, self.row_tokens), (self.batch_size, self.max_sequences)
        batch = Batch(
            tokens=np.full(shape, PAD_ID, np.int64),
            targets=np.full(shape, IGNORE_INDEX, np.int64),
            sequence_ids=np.full(shape, -1, np.int32),
            seq_lens=np.zeros(self.batch_size, np.int32),
            cu_seqlens=np.zeros((self.batch_size, self.max_sequences + 1), np.int32),
            patch_lengths=None if self.segmenter is None else np.zeros((self.batch_size, self._capacity), np.int64),
            next_is_start=None if self.segmenter is None else np.zeros(sequences, np.bool_),
        )
        for row in range(self.batch_size):
            self._fill(batch, row)
        wanted = batch.targets[batch.targets != IGNORE_INDEX]
        return replace(batch, num_bytes=int(self.tokenizer.token_bytes[wanted].sum()))

    def state_dict(self) -> dict[str, Any]:
        """The settings that `load_state_dict` compares, the state of `documents`, which document has the next turn,
        and for each open document the state of the stream before it and the number of its tokens that are in rows."""
        opened = [{"documents": d.begin, "offset": d.offset} if d and d.left else None for d in self._open]
        documents = self.documents.state_dict()
        return {"settings": self._settings, "documents": documents, "open": opened, "turn": self._turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken, and takes `documents` there too. Raises ValueError that names the first
        setting that differs, as DocumentStream.load_state_dict does, and where an open document has become shorter."""
        saved_settings = state.get("settings", {})
        for name, value in self._settings.items():
            if saved_settings.get(name) != value:
                raise ValueError(
                    f"PackedBatches.load_state_dict: {name}: expected {value!r}, got {saved_settings.get(name)!r}"
                )
        self._open = [None if saved is None else self._reopen(saved) for saved in state["open"]]
        self._turn = state["turn"]
        self.documents.load_state_dict(state["documents"])

    def _reopen(self, saved: dict[str, Any]) -> _OpenDocument:
        self.documents.load_state_dict(saved["documents"])
        document = self._read()
        size = 0 if document is None else len(document.tokens)
        if document is None or saved["offset"] > size:
            raise ValueError(
                f"PackedBatches.load_state_dict: offset: expected at most the {size} tokens of the document, got "
                f"{saved['offset']}: the corpus has changed"
            )
        document.offset = saved["offset"]
        return document

    def _read(self) -> _OpenDocument | None:
        """The next document, segmented; None at the end of the stream."""
        begin = self.documents.state_dict()
        document = next(self.documents, None)
        if document is None:
            return None
        tokens = self.tokenizer.encode(document)
        ends = np.arange(1, len(tokens) + 1) if self.segmenter is None else self._segment(tokens)
        return _OpenDocument(begin, tokens, ends)

    def _next_open(self) -> _OpenDocument | None:
        """The document whose turn it is, or the next one with tokens left; None at the end of the stream."""
        for _ in self._open:
            document = self._open[self._turn]
            if document is None or not document.left:
                document = self._open[self._turn] = self._read()
            if document is not None:
                return document
            self._pass_turn()
        return None

    def _pass_turn(self) -> None:
        self._turn = (self._turn + 1) % len(self._open)

    def _segment(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ends of the patches of a document."""
        assert self.segmenter is not None
        lengths = np.asarray(self.segmenter(tokens))
        if lengths.dtype.kind not in "iu" or lengths.ndim != 1:
            got = f"{lengths.dtype} {list(lengths.shape)}"
            raise TypeError(f"PackedBatches: segmenter: expected integer lengths with one dimension, got {got}")
        lengths = lengths.astype(np.int64)
        if lengths.sum() != len(tokens) or (lengths < 1).any():
            got = f"sum {lengths.sum()}, smallest {lengths.min(initial=0)}"
            raise ValueError(f"PackedBatches: segmenter: expected lengths >= 1 with sum {len(tokens)}, got {got}")
        ends = lengths.cumsum()
        if lengths.max() > self.row_tokens:
            cuts = [
                np.arange(end - n + self.row_tokens, end, self.row_tokens) for end, n in zip(ends, lengths, strict=True)
            ]
            ends = np.union1d(ends, np.concatenate(cuts))
        return ends

    def _fill(self, batch: Batch, row: int) -> None:
        used = patches = count = 0
        while count < self.max_sequences and patches < self._capacity:
            document = self._next_open()
            if document is None:
                break
            begin, tokens, ends = document.offset, document.tokens, document.ends
            first = int(np.searchsorted(ends, begin, "right"))
            room = np.searchsorted(ends, begin + self.row_tokens - used, "right")
            last = min(int(room), first + self._capacity - patches)
            if last == first:  # the next patch needs more tokens than are left
                break
            end = int(ends[last - 1])
            n = end - begin
            batch.tokens[row, used : used + n] = tokens[begin:end]
            following = tokens[begin + 1 : end + 1]
            batch.targets[row, used : used + len(following)] = following
            batch.sequence_ids[row, used : used + n] = count
            if batch.patch_lengths is not None and batch.next_is_start is not None:
                batch.patch_lengths[row, patches : patches + last - first] = np.diff(ends[first:last], prepend=begin)
                batch.next_is_start[row, count] = end < len(tokens)
            used += n
            patches += last - first
            count += 1
            batch.cu_seqlens[row, count:] = used
            document.offset = end
            self._pass_turn()
        batch.seq_lens[row] = used
