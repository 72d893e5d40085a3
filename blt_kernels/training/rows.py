"""The shape of training rows, and the loader that fills them."""

from __future__ import annotations

import dataclasses

from ..data import DocumentStream, PackedBatches, Tokenizer
from .patcher import Patcher


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Rows of a batch: B rows of at most N tokens and, for a BLT, exactly C slots; one sequence a row when B > 1."""

    batch_size: int
    row_tokens: int
    row_patches: int | None = None

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
