"""The shape of training rows, and the loader that fills them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

from .._checks import check_int
from ..data import OPEN_DOCUMENTS, Corpus, DocumentStream, PackedBatches, Tokenizer, encode
from .patcher import Patcher

MAX_TOKENS = 2**31 - 1

# The sample in which the mean patch is measured: blocks from all of the text that is read for it. Texts differ by a
# fifth in density, so that a few whole documents would give a mean that is several per cent off.
SAMPLE_BLOCKS = 384  # at least, and fewer than twice as many
BLOCK_TOKENS = 512
CONTEXT_TOKENS = 128  # read before a block, so that its entropies are not those of a beginning
SAMPLED_BYTES = 1 << 26
SAMPLED_FILES = 4096


@dataclasses.dataclass(frozen=True)
class RowShape:
    """A batch: one row of N tokens and, for a BLT, C patches, in which sequences of many documents are packed.

    Attributes:
        row_tokens: N, at least 1. A layout counts tokens in int32, so N is below 2^31.
        longest_sequence: L, 1 .. N: tokens of the longest sequence. A batch of many short sequences gets fullest: with
            L at most N / 16 and N at least 8192, 97 % of tokens and patches are used, and somewhat fewer where the
            density of the text drifts from file to file.
        row_patches: C, 1 .. N; None for a model without patches. See `patches_of_row`.
    """

    row_tokens: int
    longest_sequence: int
    row_patches: int | None = None

    def __post_init__(self) -> None:
        check_int("RowShape", "row_tokens", self.row_tokens, 1, MAX_TOKENS)
        check_int("RowShape", "longest_sequence", self.longest_sequence, 1, self.row_tokens)
        if self.row_patches is not None:
            check_int("RowShape", "row_patches", self.row_patches, 1, self.row_tokens)

    def batches(
        self,
        documents: DocumentStream,
        patcher: Patcher | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        open_documents: int = OPEN_DOCUMENTS,
    ) -> PackedBatches:
        """A loader of batches of this shape; `patcher` cuts documents for a BLT, `tokenizer` None gives bytes."""
        return PackedBatches(
            documents,
            self.row_tokens,
            self.longest_sequence,
            segmenter=patcher,
            row_patches=self.row_patches,
            open_documents=open_documents,
            tokenizer=tokenizer,
        )


def patches_of_row(row_tokens: int, corpus: Corpus, patcher: Patcher) -> int:
    """C for rows of N tokens, so that tokens and patches of this text are used up together: N over the mean patch."""
    return min(row_tokens, max(1, round(row_tokens / mean_patch_length(corpus, patcher))))


def mean_patch_length(corpus: Corpus, patcher: Patcher) -> float:
    """Tokens per patch, in blocks of 512 tokens that are spread evenly over the text (or over 64 MiB of its files)."""
    tokens = patches = 0
    for document, begin in _spread(_blocks(corpus)):
        context = max(0, begin - CONTEXT_TOKENS)
        sample = encode(document)[context : begin + BLOCK_TOKENS]
        lengths = patcher(sample)
        starts = context + lengths.cumsum() - lengths
        tokens += context + len(sample) - begin
        patches += int((starts >= begin).sum())
    return tokens / max(1, patches)


def _blocks(corpus: Corpus) -> Iterator[tuple[bytes, int]]:
    """Documents with the tokens at which their blocks begin. Of a large corpus the front of each file, by its size,
    because texts of one kind are often in one file."""
    files = range(0, len(corpus.files), max(1, len(corpus.files) // SAMPLED_FILES))
    total = sum(corpus.files[index].size for index in files)
    for index in files:
        left = SAMPLED_BYTES * corpus.files[index].size / total if total > SAMPLED_BYTES else math.inf
        for _, documents, _ in corpus.read(index):
            for document in documents:
                yield from ((document, begin) for begin in range(0, len(document) + 2, BLOCK_TOKENS))  # BOS and EOS
                left -= len(document)
            if left <= 0:
                break


def _spread(blocks: Iterable[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
    """Every n-th of the blocks, with the smallest power of two n that leaves fewer than 2 * SAMPLE_BLOCKS of them."""
    kept: list[tuple[bytes, int]] = []
    step = 1
    for number, block in enumerate(blocks):
        if number % step == 0:
            kept.append(block)
        if len(kept) == 2 * SAMPLE_BLOCKS:
            kept, step = kept[::2], 2 * step
    return kept
