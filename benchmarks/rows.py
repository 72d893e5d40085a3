"""`python -m benchmarks rows`: how full packed batches are, beside rows of one document each.

Prints the shares of tokens and patches in use, the longest wait of an open document in batches, and the density of the
open documents (tokens per patch of what they have left) over the run, in four parts: it should stay where it is.
The figures depend on the text and the patcher, and not on the machine.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blt_kernels.data import DEFAULT_INCLUDE, Corpus, DocumentStream, PackedBatches, encode
from blt_kernels.model import EntropyModel
from blt_kernels.training.calibration import entropy_patcher
from blt_kernels.training.load import load_model
from blt_kernels.training.patcher import Patcher, PatcherConfig
from blt_kernels.training.rows import patches_of_row
from blt_kernels.training.runs import standard_library

from .machine import describe_machine, device_name, device_slug
from .report.table import Table
from .store import write_json

FOLDER = "rows"  # in that of a device
PATCH_SIZE = 4.5  # bytes
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
    parser.add_argument("--include", nargs="*", default=DEFAULT_INCLUDE, help="patterns of the files in a folder")
    parser.add_argument(
        "--model",
        type=Path,
        help="run of a BLT, whose patcher cuts, or of an entropy model, whose\n"
        f"threshold is set for {PATCH_SIZE} bytes; default: patches at spaces",
    )
    parser.add_argument("--epochs", type=int, default=1, help="how often to read the text (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of <device>/rows/<text>-<patches>.json"
    )
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs: expected at least 1, got {options.epochs}")
    name, corpus = "standard library", standard_library()
    if options.data is not None:
        name = options.data.name
        corpus = Corpus(options.data, include=options.include, max_document_bytes=1 << 16)
    patcher = patcher_of(options.model, corpus)
    cut = remembering(patcher)
    rows = []
    for row_tokens, longest in SHAPES:
        patches = patches_of_row(row_tokens, corpus, patcher)
        stream = DocumentStream(corpus, epochs=options.epochs)
        batches = PackedBatches(stream, row_tokens, longest, segmenter=cut, row_patches=patches)
        share = round(longest * patches / row_tokens)
        rows.append(
            {
                "row_tokens": row_tokens,
                "row_patches": patches,
                "longest_sequence": longest,
                "packed": dataclasses.asdict(packed(batches)),
                "one_document": dataclasses.asdict(one_document_a_row(corpus, cut, share, round(ROOM * longest))),
            }
        )
    device = torch.device("cpu")
    result = {
        "text": name,
        "patcher": dataclasses.asdict(patcher.config),
        "machine": describe_machine(device),
        "rows": rows,
    }
    file = f"{name}-{patcher.config.method}".replace(" ", "-")
    path = options.out / device_slug(device_name(device)) / FOLDER / f"{file}.json"
    write_json(path, result)
    table([result]).show()
    print(path)


def patcher_of(run: Path | None, corpus: Corpus) -> Patcher:
    """The patcher of a run; patches at spaces where there is none.

    Raises:
        CheckpointError: the run has no checkpoint, or a damaged one.
    """
    if run is None:
        return Patcher(PatcherConfig("spaces"))
    model, patcher, _ = load_model(run)
    if patcher is not None:
        return patcher
    assert isinstance(model, EntropyModel)  # a BLT has a patcher
    return entropy_patcher(model, corpus, threshold=None, patch_size=PATCH_SIZE)


def table(found: list[dict[str, Any]]) -> Table:
    """The results of this benchmark, a line for each text and shape of rows."""
    lines = []
    for result in found:
        for row in result["rows"]:
            packed, one = row["packed"], row["one_document"]
            lines.append(
                (
                    f"{result['text']}, {result['patcher']['method']}",
                    f"{row['row_tokens']} x {row['row_patches']}",
                    str(row["longest_sequence"]),
                    f"{packed['tokens']:.1%}",
                    f"{packed['patches']:.1%}",
                    str(packed["wait"]),
                    " ".join(f"{density:.2f}" for density in packed["densities"]),
                    f"{one['tokens']:.1%}",
                    f"{one['patches']:.1%}",
                )
            )
    columns = (
        "text, patches at", "tokens x patches", "longest sequence", "tokens used", "patches used",
        "longest wait, batches", "tokens per open patch", "one document a row: tokens used", "patches used",
    )  # fmt: skip
    return Table("How full rows are", columns, lines)


def read_all(folder: Path) -> list[dict[str, Any]]:
    """The results in the folder of a device, in the order of their names.

    Raises:
        ValueError: one is damaged.
    """
    found = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not a readable result: {error}") from error
        if not isinstance(result, dict) or any(key not in result for key in ("text", "patcher", "machine", "rows")):
            raise ValueError(f"{path}: not a result of `python -m benchmarks rows`")
        found.append(result)
    return found


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
        if number % 8 == 0:  # it takes longer than to make a batch
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
