"""The definition of every op in a few readable lines of PyTorch: any device, any float dtype, differentiable."""

from .decoder_cross_attention import decoder_cross_attention
from .encoder_cross_attention import encoder_cross_attention
from .entropy import entropy
from .hash_ngram_embedding import hash_ngram_embedding, hash_ngram_embedding_row_grad, hash_ngram_ids
from .linear_entropy import linear_entropy
from .patch_gather import patch_gather
from .patch_pool import patch_pool
from .rowwise_adagrad_update import rowwise_adagrad_update
from .segment import segment, segment_fixed, segment_spaces
from .segment_logits import segment_logits

__all__ = [
    "decoder_cross_attention",
    "encoder_cross_attention",
    "entropy",
    "hash_ngram_embedding",
    "hash_ngram_embedding_row_grad",
    "hash_ngram_ids",
    "linear_entropy",
    "patch_gather",
    "patch_pool",
    "rowwise_adagrad_update",
    "segment",
    "segment_fixed",
    "segment_logits",
    "segment_spaces",
]
