"""The text of the benchmark: the same training documents, and the same held-out bytes, for every model."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from blt_kernels._files import atomic_path
from blt_kernels.data import Corpus, CorpusError, DocumentStream, split_corpus
from blt_kernels.data.readers import split_document
from blt_kernels.training.calibration import set_apart
from blt_kernels.training.runs import standard_library

from .noise import NOISES, noised

SMALL_LANGUAGES = Path(__file__).parent / "languages"
MAX_DOCUMENT_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Texts:
    """Attributes:
    name: what the text is, without a path.
    train: the corpus that models, tokenizer and entropy model are trained on.
    calibration: what the entropy threshold is calibrated on, which no model has read.
    valid: the sample that curves are drawn with and learning rates are chosen by.
    test: by name, what final figures are of: "clean", the same documents under each noise, and "language <name>".
    fingerprint: of the training text.
    """

    name: str
    train: Corpus
    calibration: Corpus
    valid: Corpus
    test: dict[str, Corpus]
    fingerprint: str


def open_texts(
    data: Path | None,
    languages: Path | None,
    work: Path,
    *,
    valid_bytes: int,
    test_bytes: int,
    document_bytes: int,
    language_bytes: int,
) -> Texts:
    """Opens the text and writes the held-out samples under `work`, once.

    Args:
        data: a file or folder of text. A folder whose files are named train, valid and test (in any subfolders, such
            as `<language>/train.jsonl.xz`) is split so; of any other, a part is held out. None: Python's standard
            library.
        languages: a folder of `<language>/test.*` to evaluate on. None: `data` if it has that form, else a few
            sentences in ten languages that come with the benchmark.
        valid_bytes, test_bytes, language_bytes: sizes of the samples, to the end of a document.
        document_bytes: of each held-out document, at most this much from its start.

    Raises:
        CorpusError: there is no such text, or too little of it.
    """
    train, valid, test = _splits(data, valid_bytes, test_bytes)
    train, calibration = set_apart(train)
    fingerprint = train.fingerprint()
    folder = work / fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"clean": _sample(folder / "test.jsonl", _beginnings(test, document_bytes), test_bytes)}
    for noise in NOISES:
        path = folder / f"test-{noise.replace(' ', '-')}.jsonl"
        parts[noise] = _sample(path, (noised(document, noise) for document in parts["clean"]), None)
    if languages is None:
        languages = data if data is not None and any(data.glob("*/test.*")) else SMALL_LANGUAGES
    for path in sorted(languages.glob("*/test.*")):
        documents = _beginnings(Corpus(path), document_bytes)
        sample = _sample(folder / f"language-{path.parent.name}.jsonl", documents, language_bytes)
        parts[f"language {path.parent.name}"] = sample
    sample = _sample(folder / "valid.jsonl", _beginnings(valid, document_bytes), valid_bytes)
    return Texts(text_name(data), train, calibration, sample, parts, fingerprint)


def text_name(data: Path | None) -> str:
    """What a result calls its text, without a path; None is Python's standard library."""
    return data.name if data is not None else f"standard library of Python {sys.version_info[0]}.{sys.version_info[1]}"


def _splits(data: Path | None, valid_bytes: int, test_bytes: int) -> tuple[Corpus, Corpus, Corpus]:
    if data is not None and data.is_dir() and any(data.rglob("train.*")):
        train, valid, test = (
            Corpus(data, include=f"*/{split}.*", max_document_bytes=MAX_DOCUMENT_BYTES)
            for split in ("train", "valid", "test")
        )
        return train, valid, test
    corpus = standard_library() if data is None else Corpus(data, max_document_bytes=MAX_DOCUMENT_BYTES)
    # More than the samples need, since they take only the beginnings of documents.
    room = min(1 << 20, sum(file.size for file in corpus.files) // 20)
    rest, test = split_corpus(corpus, max(room, test_bytes), seed=0)
    train, valid = split_corpus(rest, max(room, valid_bytes), seed=1)
    return train, valid, test


def _beginnings(corpus: Corpus, document_bytes: int) -> Iterator[bytes]:
    """The beginning of each document, in a shuffled order, so that a sample is of all files."""
    for document in DocumentStream(corpus, seed=0, epochs=1):
        yield split_document(document, document_bytes)[0]


def _sample(path: Path, documents: Iterable[bytes], num_bytes: int | None) -> Corpus:
    """Writes documents to `path` until they hold `num_bytes` (None: all), unless that is done, and opens it."""
    if not path.exists():
        size = 0
        with atomic_path(path) as partial, open(partial, "w") as file:
            for document in documents:
                file.write(json.dumps({"text": document.decode()}) + "\n")
                size += len(document)
                if num_bytes is not None and size >= num_bytes:
                    break
            if size == 0:
                raise CorpusError(f"{path.stem}: no text to hold out", reason="empty")
    return Corpus(path)


def take(corpus: Corpus, num_bytes: int) -> Iterator[bytes]:
    """Training documents in the order of seed 0, each once, until they hold `num_bytes`."""
    for document in DocumentStream(corpus, seed=0, epochs=1):
        yield document
        num_bytes -= len(document)
        if num_bytes <= 0:
            return
