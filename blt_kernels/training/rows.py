"""The shape of training rows, and the loader that fills them."""

from __future__ import annotations

import dataclasses

from .._checks import check_int
from ..data import DocumentStream, PackedBatches, Tokenizer
from .patcher import Patcher

MAX_TOKENS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Rows of a batch: B rows of at most N tokens and, for a BLT, exactly C slots; one sequence a row when B > 1.

    Attributes:
        batch_size: B, at least 1.
        row_tokens: N, at least 1. A layout counts the tokens of a batch in int32, so B * N is below 2^31.
        row_patches: C, 1 .. N; None for a model without patches.
    """

    batch_size: int
    row_tokens: int
    row_patches: int | None = None

    def __post_init__(self) -> None:
        check_int("RowShape", "batch_size", self.batch_size, 1, MAX_TOKENS)
        check_int("RowShape", "row_tokens", self.row_tokens, 1, MAX_TOKENS // self.batch_size)
        if self.row_patches is not None:
            check_int("RowShape", "row_patches", self.row_patches, 1, self.row_tokens)

    def batches(
        self, documents: DocumentStream, patcher: Patcher | None = None, *, tokenizer: Tokenizer | None = None
    ) -> PackedBatches:
        """A loader of batches of this shape; `patcher` cuts documents for a BLT, `tokenizer` None gives bytes."""
        return PackedBatches(
            documents,
            self.row_tokens,
            self.batch_size,
            segmenter=patcher,
            row_patches=self.row_patches,
            max_sequences=1 if self.batch_size > 1 else None,
            tokenizer=tokenizer,
        )
