"""`python -m benchmarks rows`: how full packed batches are, beside rows of one document each.

Prints the shares of tokens and patches in use, the longest wait of an open document in batches, and the density of the
open documents (tokens per patch of what they have left) over the run, in four parts: it should stay where it is.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blt_kernels.data import Corpus, DocumentStream, PackedBatches, encode
from blt_kernels.training.patcher import Patcher, PatcherConfig
from blt_kernels.training.rows import patches_of_row
from blt_kernels.training.runs import standard_library
from blt_kernels.training.trainer import load_model

from .report.table import Table

SHAPES = ((8192, 512), (8192, 1024), (32768, 2048))  # tokens of a row and of the longest sequence
# Rows of one document each, as they were before: of 1.3 times the mean bytes, so that patches are the scarcer.
ROOM = 1.3

Cut = Callable[[NDArray[np.int64]], NDArray[np.int64]]


@dataclasses.dataclass(frozen=True)
class Fullness:
    """Attributes:
    tokens, patches: shares in use.
    wait: batches, the longest time without a piece of an open document; None where documents do not wait.
    densities: tokens per patch of the open documents, in four parts of the run.
    """

    tokens: float
    patches: float
    wait: int | None = None
    densities: tuple[float, ...] = ()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks rows", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="text; default: Python's standard library")
    parser.add_argument("--model", type=Path, help="run of a BLT, whose patcher cuts; default: patches at spaces")
    parser.add_argument("--epochs", type=int, default=2, help="how often to read the text (default: 2)")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs: expected at least 1, got {options.epochs}")
    corpus = standard_library() if options.data is None else Corpus(options.data, max_document_bytes=1 << 16)
    patcher = Patcher(PatcherConfig("spaces")) if options.model is None else load_model(options.model)[1]
    if patcher is None:
        raise ValueError(f"{options.model}: expected a model with a patcher")
    cut = remembering(patcher)
    lines = []
    for row_tokens, longest in SHAPES:
        patches = patches_of_row(row_tokens, corpus, patcher)
        stream = DocumentStream(corpus, epochs=options.epochs)
        batches = PackedBatches(stream, row_tokens, longest, segmenter=cut, row_patches=patches)
        shape = f"{row_tokens} tokens, {patches} patches, sequences of {longest}"
        lines.append((f"packed: {shape}", *_figures(packed(batches))))
        share = round(longest * patches / row_tokens)
        padded = one_document_a_row(corpus, cut, share, round(ROOM * longest))
        lines.append((f"one document a row: {round(ROOM * longest)} tokens, {share} patches", *_figures(padded)))
    columns = ("rows", "tokens used", "patches used", "longest wait", "density of open documents")
    Table("How full rows are", columns, lines).show()


def packed(batches: PackedBatches) -> Fullness:
    """What the batches of a finite stream hold, those of its end left out, where few documents are open."""
    tokens: list[int] = []
    patches: list[int] = []
    densities: list[float] = []
    latest: dict[str, tuple[int, int]] = {}  # of each open document: its latest piece, and the batch of that
    longest_wait = 0
    for number, batch in enumerate(batches):
        opened = batches.state_dict()["open"]
        if number and len(opened) < len(latest):
            break
        tokens.append(batch.num_tokens)
        patches.append(batch.num_patches)
        densities.append(density(opened))
        before, latest = latest, {}
        for document in opened:
            name, piece = str((document["epoch"], document["address"])), document["latest"]
            known = before.get(name)
            latest[name] = known if known is not None and known[0] == piece else (piece, number)
            longest_wait = max(longest_wait, number - latest[name][1])
    capacity = batches.row_patches or batches.row_tokens
    parts = tuple(float(np.mean(part)) for part in np.array_split(densities, 4))
    return Fullness(
        float(np.mean(tokens)) / batches.row_tokens, float(np.mean(patches)) / capacity, longest_wait, parts
    )


def density(opened: list[dict]) -> float:
    """Tokens per patch in what the open documents of a loader's state have left."""
    bits = [
        np.unpackbits(np.frombuffer(base64.b64decode(document["patches"]), np.uint8))[document["offset"] :]
        for document in opened
        if document["patches"] is not None
    ]
    return sum(map(len, bits)) / max(1, sum(int(part.sum()) for part in bits))


def one_document_a_row(corpus: Corpus, cut: Cut, row_patches: int, row_tokens: int) -> Fullness:
    """Rows of at most so many patches and tokens, each a stretch of one document."""
    rows = tokens = patches = 0
    for document in DocumentStream(corpus, epochs=1):
        ends = cut(encode(document)).cumsum()
        begin = first = 0
        while first < len(ends):
            fitting = int(np.searchsorted(ends, begin + row_tokens, "right"))
            last = max(first + 1, min(fitting, first + row_patches))
            tokens += min(row_tokens, int(ends[last - 1]) - begin)
            rows, patches, begin, first = rows + 1, patches + last - first, int(ends[last - 1]), last
    return Fullness(tokens / (rows * row_tokens), patches / (rows * row_patches))


def remembering(patcher: Patcher) -> Cut:
    """A patcher that cuts each document once, since every shape and epoch asks again."""
    known: dict[bytes, NDArray[np.int64]] = {}

    def cut(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        key = tokens.astype(np.int16).tobytes()
        if key not in known:
            known[key] = patcher(tokens)
        return known[key]

    return cut


def _figures(fullness: Fullness) -> tuple[str, str, str, str]:
    wait = "" if fullness.wait is None else f"{fullness.wait} batches"
    densities = " ".join(f"{value:.2f}" for value in fullness.densities)
    return f"{fullness.tokens:.1%}", f"{fullness.patches:.1%}", wait, densities
