"""Pieces of many documents packed into one row of constant size, so that its bytes and its patches are both used up."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._checks import check_int, fail_value
from ..tokens import IGNORE_INDEX, PAD_ID
from .corpus import Address, order_key
from .stream import DocumentStream
from .tokens import ByteTokenizer, Tokenizer

STATE_VERSION = 5
OPEN_DOCUMENTS = 64
# A document that gave none of the last 4 * open_documents pieces gives the next one. Without this rule the documents
# whose density does not suit the others would wait longest, and the open ones would come to be only such.
_PATIENCE = 4
_TAIL = 0.25  # the share of a batch in which pieces are chosen and not drawn
# A batch ends where less than this share of its tokens or patches is left: a sequence of a few bytes would
# cut a document in two and fill next to nothing.
_REST = 0.005

Segmenter = Callable[[NDArray[np.int64]], Any]


@dataclass(frozen=True)
class Batch:
    """One row of N tokens. A *sequence* is a document or a part of one that lies in the row without a break; nothing
    may be attended to, hashed or patched across sequences. The row holds at most S sequences, then padding.

    Attributes:
        tokens: int64 [1, N]; PAD_ID after the last sequence.
        targets: int64 [1, N]: the next token of the same document, also where that is in another sequence;
            IGNORE_INDEX at EOS and padding. So every token of a document but its BOS is a target exactly once.
        cu_seqlens: int32 [S+1]: where the sequences start and end; repeats its last value, which is `num_tokens`.
        longest_sequence: L: no sequence has more tokens, in any batch of the loader; nor more than its share of the
            patches, ceil(L * C / N).
        patch_lengths: int64 [1, C]: tokens of each patch; 0 after the last; sums to `num_tokens`. None without a
            segmenter.
        next_is_start: bool [S]: whether the document goes on in another sequence. That one begins with a new patch,
            so the last patch of this one is finished. None without a segmenter.
        num_bytes: bytes of text that the targets stand for; BOS, EOS and padding stand for none.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    longest_sequence: int
    patch_lengths: NDArray[np.int64] | None = None
    next_is_start: NDArray[np.bool_] | None = None
    num_bytes: int = 0

    @property
    def longest_patches(self) -> int | None:
        """No sequence has more patches, in any batch of the loader; None without a segmenter."""
        if self.patch_lengths is None:
            return None
        return -(-self.longest_sequence * self.patch_lengths.shape[1] // self.tokens.shape[1])

    @property
    def num_tokens(self) -> int:
        """Tokens before the padding."""
        return int(self.cu_seqlens[-1])

    @property
    def num_patches(self) -> int:
        """Patches in use; without a segmenter every token is one."""
        return self.num_tokens if self.patch_lengths is None else int(np.count_nonzero(self.patch_lengths))


class _Size(NamedTuple):
    """How much is left of a row, or what a piece takes of it."""

    tokens: int
    patches: int


@dataclass
class _OpenDocument:
    """A document of which some tokens are still to be put into rows. It is cut into patches when it is first drawn."""

    epoch: int
    address: Address
    text: bytes
    latest: int  # number of the piece that was its latest, or before which it was opened
    offset: int = 0  # tokens that are in rows
    tokens: NDArray[np.int32] | None = None
    ends: NDArray[np.int32] | None = None  # of its patches
    patches: str | None = None  # `ends` as the state has them

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "address": list(self.address),
            "latest": self.latest,
            "offset": self.offset,
            "patches": self.patches,
        }


class PackedBatches:
    """An iterator of Batch: each document of `documents` as BOS, bytes, EOS, in pieces of at most L tokens.

    Three quarters of a batch are pieces of open documents that are drawn at random. In the last quarter (or where a
    sequence of L tokens does not fit any more) the next piece is the one that leaves the least of both tokens and
    patches, so that they are used up together. Where a document ends, another one is opened in its place. The loader
    ends when `documents` does and nothing is open; the last batches may be less full, but the shape stays.

    `state_dict()` is JSON-able, with one bit for each token of the open documents. To read ahead of training, keep for
    each batch the state taken right after it was made. Loading reads the open documents again and segments none.

    Args:
        documents: what is packed. Its seed also gives the draw.
        row_tokens: N.
        longest_sequence: L, at most N. A sequence has no more than its share of the patches either, L * C / N rounded
            up: a piece of a dense document is shorter, and takes no patches that others need.
        segmenter: called with the tokens of a whole document, int64 [n]; returns the lengths of its patches, integers
            of at least 1 that sum to n, as an array or sequence. Pieces are cut at patch boundaries; a patch of more
            than L tokens is cut into L, L, ..., rest.
        row_patches: C, with a segmenter. What is used is limited by the scarcer of both, so N / C should be the mean
            length of the patches of these documents: see `training.rows.patches_of_row`.
        max_sequences: S. A row that holds S sequences ends there. None: N / 64, at least 16; at most C.
        open_documents: how many documents are open at a time. Pieces of one document are alike, and a batch of few
            documents gives a noisy gradient; with many to choose from a batch gets full. Open documents are held in
            memory. 1 packs the documents in their own order.
        tokenizer: makes the tokens of a document. None: a ByteTokenizer.

    Raises:
        TypeError, ValueError: wrong arguments or wrong patch lengths.
    """

    def __init__(
        self,
        documents: DocumentStream,
        row_tokens: int,
        longest_sequence: int,
        *,
        segmenter: Segmenter | None = None,
        row_patches: int | None = None,
        max_sequences: int | None = None,
        open_documents: int = OPEN_DOCUMENTS,
        tokenizer: Tokenizer | None = None,
    ):
        op = "PackedBatches"
        if not isinstance(documents, DocumentStream):
            raise TypeError(f"{op}: documents: expected a DocumentStream, got {type(documents).__name__}")
        if (segmenter is None) != (row_patches is None):
            raise ValueError(f"{op}: row_patches: expected together with segmenter, got one of them")
        check_int(op, "row_tokens", row_tokens, 1)
        check_int(op, "longest_sequence", longest_sequence, 1, row_tokens)
        check_int(op, "open_documents", open_documents, 1)
        for name, value in {"row_patches": row_patches, "max_sequences": max_sequences}.items():
            if value is not None:
                check_int(op, name, value, 1)
        self.documents = documents
        self.row_tokens = row_tokens
        self.longest_sequence = longest_sequence
        self.segmenter = segmenter
        self.tokenizer = tokenizer or ByteTokenizer()
        self.row_patches = row_patches
        # Without a segmenter every token is a patch, and the same cutting serves.
        self._capacity = row_patches or row_tokens
        self._longest_patches = -(-longest_sequence * self._capacity // row_tokens)
        self.max_sequences = max_sequences or min(max(16, row_tokens // 64), self._capacity)
        self._settings = {
            "version": STATE_VERSION,
            "row_tokens": row_tokens,
            "longest_sequence": longest_sequence,
            "row_patches": row_patches,
            "max_sequences": self.max_sequences,
            "open_documents": open_documents,
        }
        self._open_documents = open_documents
        self._open: list[_OpenDocument] = []
        self._pieces = 0  # made so far, over all batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._open) < self._open_documents and (document := self._read()):
            self._open.append(document)
        if not self._open:
            raise StopIteration
        shape = (1, self.row_tokens)
        batch = Batch(
            tokens=np.full(shape, PAD_ID, np.int64),
            targets=np.full(shape, IGNORE_INDEX, np.int64),
            cu_seqlens=np.zeros(self.max_sequences + 1, np.int32),
            longest_sequence=self.longest_sequence,
            patch_lengths=None if self.segmenter is None else np.zeros((1, self._capacity), np.int64),
            next_is_start=None if self.segmenter is None else np.zeros(self.max_sequences, np.bool_),
        )
        self._fill(batch)
        wanted = batch.targets[batch.targets != IGNORE_INDEX]
        return replace(batch, num_bytes=int(self.tokenizer.token_bytes[wanted].sum()))

    def state_dict(self) -> dict[str, Any]:
        """The settings that `load_state_dict` compares, the state of `documents`, the number of pieces so far, and
        for each open document where it lies in the corpus, how much of it is in rows, and its patches."""
        return {
            "settings": self._settings,
            "documents": self.documents.state_dict(),
            "pieces": self._pieces,
            "open": [document.state() for document in self._open],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken, and takes `documents` there too. Raises ValueError that names the first
        setting that differs, as DocumentStream.load_state_dict does, and where an open document is another one."""
        saved_settings = state.get("settings", {})
        for name, value in self._settings.items():
            if saved_settings.get(name) != value:
                raise fail_value("PackedBatches.load_state_dict", name, repr(value), repr(saved_settings.get(name)))
        addresses = [Address(*saved["address"]) for saved in state["open"]]
        texts = self.documents.corpus.fetch(addresses)
        self._open = [
            self._reopen(address, texts.get(address, b""), saved)
            for address, saved in zip(addresses, state["open"], strict=True)
        ]
        self._pieces = state["pieces"]
        self.documents.load_state_dict(state["documents"])

    def _reopen(self, address: Address, text: bytes, saved: dict[str, Any]) -> _OpenDocument:
        document = _OpenDocument(
            saved["epoch"], address, text, saved["latest"], saved["offset"], patches=saved["patches"]
        )
        tokens = self.tokenizer.encode(text).astype(np.int32)
        if document.patches is not None:
            document.tokens, document.ends = tokens, self._ends_from(document.patches, len(tokens))
        if not text or document.offset >= len(tokens) or (document.patches is not None and document.ends is None):
            raise ValueError(
                f"PackedBatches.load_state_dict: open: expected the document that was open, got another one with "
                f"{len(tokens)} tokens: the corpus has changed"
            )
        return document

    def _read(self) -> _OpenDocument | None:
        """The next document; None at the end of the stream."""
        text = next(self.documents, None)
        if text is None:
            return None
        return _OpenDocument(self.documents.epoch, self.documents.address, text, self._pieces)

    def _cut(self, document: _OpenDocument) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The tokens of a document and the ends of its patches, made when they are first asked for."""
        if document.tokens is None or document.ends is None:
            tokens = self.tokenizer.encode(document.text)
            ends = np.arange(1, len(tokens) + 1) if self.segmenter is None else self._segment(tokens)
            document.tokens, document.ends = tokens.astype(np.int32), ends.astype(np.int32)
            document.patches = self._patches_of(document.ends)
        return document.tokens, document.ends

    def _patches_of(self, ends: NDArray[np.int32]) -> str:
        """One bit for each token, set where a patch ends; base64. Without a segmenter there is nothing to say."""
        if self.segmenter is None:
            return ""
        is_last = np.zeros(ends[-1], np.bool_)
        is_last[ends - 1] = True
        return base64.b64encode(np.packbits(is_last).tobytes()).decode()

    def _ends_from(self, patches: str, num_tokens: int) -> NDArray[np.int32] | None:
        """The inverse of `_patches_of`; None where the patches are not those of so many tokens."""
        if self.segmenter is None:
            return np.arange(1, num_tokens + 1, dtype=np.int32)
        bits = np.unpackbits(np.frombuffer(base64.b64decode(patches), np.uint8))
        ends = np.flatnonzero(bits).astype(np.int32) + 1
        return ends if len(bits) == -(-num_tokens // 8) * 8 and ends[-1] == num_tokens else None

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
        ends, most = lengths.cumsum(), self.longest_sequence
        if lengths.max() > most:
            cuts = [np.arange(end - n + most, end, most) for end, n in zip(ends, lengths, strict=True)]
            ends = np.union1d(ends, np.concatenate(cuts))
        return ends

    def _fill(self, batch: Batch) -> None:
        used = patches = 0
        for count in range(self.max_sequences):
            room = _Size(self.row_tokens - used, self._capacity - patches)
            share = min(room.tokens / self.row_tokens, room.patches / self._capacity)
            if not self._open or share < _REST:
                break
            is_tail = share <= _TAIL or room.tokens < self.longest_sequence
            index = self._choose(room) if is_tail else self._draw()
            document = self._open[index]
            piece = self._piece(document, room)
            if not piece.patches:  # no patch is short enough for what is left
                break
            self._put(batch, count, used, patches, document, piece)
            used += piece.tokens
            patches += piece.patches
            self._pieces += 1
            document.offset += piece.tokens
            document.latest = self._pieces
            if document.offset == len(self._cut(document)[0]):
                following = self._read()
                self._open[index : index + 1] = [] if following is None else [following]

    def _random(self) -> int:
        """The index of an open document: a hash of the seed and the number of the piece that comes next."""
        return int.from_bytes(order_key(self.documents.seed, "piece", self._pieces), "little") % len(self._open)

    def _draw(self) -> int:
        """The index of the open document that gives the next piece, where there is room for any."""
        oldest = min(range(len(self._open)), key=lambda index: self._open[index].latest)
        if self._pieces - self._open[oldest].latest >= _PATIENCE * self._open_documents:
            return oldest
        return self._random()

    def _choose(self, room: _Size) -> int:
        """The index of the open document whose next piece leaves the least of the scarcer of tokens and patches.

        Long documents that are not cut yet take no part, because cutting all of them would delay the first batches.
        """
        start = self._random()  # of equally good ones not always the first
        indices = [*range(start, len(self._open)), *range(start)]
        cheap = [i for i in indices if self._open[i].tokens is not None or len(self._open[i].text) <= room.tokens]

        def left(index: int) -> float:
            piece = self._piece(self._open[index], room)
            if not piece.patches:
                return 1.0
            return max((room.tokens - piece.tokens) / self.row_tokens, (room.patches - piece.patches) / self._capacity)

        return min(cheap or indices[:1], key=left)

    def _piece(self, document: _OpenDocument, room: _Size) -> _Size:
        """The size of the next piece of a document: as many whole patches as fit, in a sequence and in `room`."""
        _, ends = self._cut(document)
        first = int(np.searchsorted(ends, document.offset, "right"))
        end = document.offset + min(room.tokens, self.longest_sequence)
        most = min(room.patches, self._longest_patches)
        last = min(int(np.searchsorted(ends, end, "right")), first + most)
        return _Size(int(ends[last - 1]) - document.offset if last > first else 0, last - first)

    def _put(self, batch: Batch, count: int, used: int, patches: int, document: _OpenDocument, piece: _Size) -> None:
        """Writes a piece as sequence `count` of a batch, behind `used` tokens and `patches` patches."""
        tokens, ends = self._cut(document)
        begin, end = document.offset, document.offset + piece.tokens
        batch.tokens[0, used : used + piece.tokens] = tokens[begin:end]
        following = tokens[begin + 1 : end + 1]
        batch.targets[0, used : used + len(following)] = following
        batch.cu_seqlens[count + 1 :] = used + piece.tokens
        if batch.patch_lengths is not None and batch.next_is_start is not None:
            first = int(np.searchsorted(ends, begin, "right"))
            lengths = np.diff(ends[first : first + piece.patches], prepend=begin)
            batch.patch_lengths[0, patches : patches + piece.patches] = lengths
            batch.next_is_start[count] = end < len(tokens)
