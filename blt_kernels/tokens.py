"""The vocabulary of published Byte Latent Transformers: four special tokens, then byte b as `BYTE_OFFSET` + b."""

from __future__ import annotations

BOE_ID = 0  # beginning of an example; published code never writes it, so that it serves as padding
BOS_ID = 1
EOS_ID = 2
BPE_ID = 3  # delimiter of a BPE token
BYTE_OFFSET = 4
VOCAB_SIZE = BYTE_OFFSET + 256
PAD_ID = BOE_ID
IGNORE_INDEX = -100  # of targets that do not count, as in torch's cross-entropy
