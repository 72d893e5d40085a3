"""A held-out part of a corpus."""

from __future__ import annotations

from dataclasses import replace

from .._checks import check_int
from .corpus import Corpus, CorpusFile, order_key
from .errors import CorpusError
from .readers import kind_of


def split_corpus(corpus: Corpus, holdout_bytes: int = 1 << 20, *, seed: int = 0) -> tuple[Corpus, Corpus]:
    """Divides `corpus` into (training, held-out), the latter with at least `holdout_bytes` bytes of documents.

    Files are visited in an order given by `seed` and their names until enough is held out, so that of a corpus with
    some files more no other text file of the first is held out than before. Text files that are longer than a 32nd of
    what is held out come last, unless the others are fewer than twice as many bytes: a few long files, each of them
    perhaps out of the ordinary, would not stand for the text. Of Python's standard library it halves the error of the
    mean patch, to 1.6 %.

    A text file is held out whole while others remain for training. JSON lines and Parquet files, and a text file that
    would be the last, give an equal share each: their first records (lines of text) are held out, the rest is for
    training. So a file smaller than its share is held out whole. No record is in both parts; equal records in different
    places may be. Only what is held out is read.

    Raises TypeError/ValueError for bad arguments, CorpusError where nothing would be left for training.
    """
    check_int("split_corpus", "holdout_bytes", holdout_bytes, 1)
    # Short pieces, so that a text file is cut near where enough is reached.
    pieces = min(corpus.max_document_bytes, max(4, holdout_bytes // 16))
    reader = corpus.with_files(corpus.files, max_document_bytes=pieces)
    training: dict[int, CorpusFile] = dict(enumerate(corpus.files))
    held: dict[int, CorpusFile] = {}
    missing = holdout_bytes
    long = _long_files(corpus, holdout_bytes)
    while missing > 0 and training:  # again if some files were smaller than their share
        order = sorted(
            training, key=lambda index: (index in long, order_key(seed, "holdout", corpus.files[index].name))
        )
        for place, index in enumerate(order):
            if missing <= 0:
                break
            share = -(-missing // (len(order) - place))
            file = training.pop(index)
            held[index] = replace(file, start=corpus.files[index].start)
            whole = bool(training) and kind_of(file.path) == "text"
            for cursor, documents, _ in reader.read(index, file.start):
                size = sum(map(len, documents))
                missing -= size
                share -= size
                if share <= 0 and not whole:
                    held[index], training[index] = replace(held[index], stop=cursor), replace(file, start=cursor)
                    break
    rest = [training[index] for index in sorted(training)]
    probe = corpus.with_files(rest)
    if missing > 0 or not any(documents for index in range(len(rest)) for _, documents, _ in probe.read(index)):
        raise _nothing_left(holdout_bytes, holdout_bytes - missing, reader, probe)
    return corpus.with_files(rest), corpus.with_files([held[index] for index in sorted(held)])


def _long_files(corpus: Corpus, holdout_bytes: int) -> set[int]:
    """The text files that are held out only when the others are, which are at least twice as many bytes."""
    sizes = dict(enumerate(file.size for file in corpus.files))
    long = {i for i, size in sizes.items() if size > holdout_bytes // 32 and kind_of(corpus.files[i].path) == "text"}
    return long if sum(size for i, size in sizes.items() if i not in long) >= 2 * holdout_bytes else set()


def _nothing_left(holdout_bytes: int, read_bytes: int, reader: Corpus, probe: Corpus) -> CorpusError:
    """The error for a corpus that cannot be divided; `reader` has read all of its documents, `probe` what was left."""
    if read_bytes == 0:
        return reader.no_documents()
    skipped = [str(part.skipped) for part in (reader, probe) if part.skipped.total]
    return CorpusError(
        f"split_corpus: holdout_bytes: holding out {holdout_bytes} bytes leaves nothing to train on in "
        f"{reader.origin}, which has {read_bytes} bytes of text; a record of JSON lines or Parquet and a line of text "
        f"are not divided" + "".join(f"; skipped: {text}" for text in skipped),
        reason="empty",
    )
