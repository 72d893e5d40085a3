"""From files to batches: reads a corpus as a stream, shuffles and shards it, and packs it into rows.

It makes numpy arrays and uses no torch; Parquet files and .zst files need the packages pyarrow and zstandard.

    corpus = Corpus("texts/")
    train, held_out = split_corpus(corpus, seed=0)
    batches = PackedBatches(DocumentStream(train, seed=0), row_tokens=8192, longest_sequence=512)
    for batch in batches: ...
"""

from .batches import OPEN_DOCUMENTS, Batch, PackedBatches
from .corpus import Address, Corpus, Skipped
from .errors import CorpusError
from .files import DEFAULT_INCLUDE, CorpusFile, LeftOut
from .split import split_corpus
from .stream import DocumentStream
from .tokens import ByteTokenizer, Tokenizer, decode, encode

__all__ = [
    "DEFAULT_INCLUDE",
    "OPEN_DOCUMENTS",
    "Address",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "CorpusError",
    "CorpusFile",
    "DocumentStream",
    "LeftOut",
    "PackedBatches",
    "Skipped",
    "Tokenizer",
    "decode",
    "encode",
    "split_corpus",
]
