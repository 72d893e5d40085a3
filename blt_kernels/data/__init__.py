"""From files to batches: read a corpus as a stream, shuffle and shard it, pack it into rows. Needs numpy alone.

corpus = Corpus("texts/")
train, held_out = split_corpus(corpus, seed=0)
batches = PackedBatches(DocumentStream(train, seed=0), row_tokens=8192)
for batch in batches: ...
"""

from .batches import Batch, PackedBatches
from .corpus import Corpus, Skipped
from .errors import CorpusError
from .files import DEFAULT_INCLUDE, CorpusFile, LeftOut
from .split import split_corpus
from .stream import DocumentStream
from .tokens import ByteTokenizer, Tokenizer, decode, encode

__all__ = [
    "DEFAULT_INCLUDE",
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
