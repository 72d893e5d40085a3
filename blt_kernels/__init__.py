"""Fused kernels for dynamic-patch byte models. Everything public is importable from here."""

from . import _library as _library  # registers torch.ops.blt_kernels.* or explains why it cannot
from .backend import available_backends, use_backend
from .doctor import build_info
from .layout import PatchLayout
from .ops.decoder_cross_attention import decoder_cross_attention
from .ops.encoder_cross_attention import encoder_cross_attention
from .ops.entropy import entropy
from .ops.hash_ngram_embedding import (
    HASH_PRIMES,
    hash_ngram_embedding,
    hash_ngram_embedding_row_grad,
    hash_ngram_ids,
    keep_coalesced,
)
from .ops.linear_entropy import linear_entropy
from .ops.patch_gather import patch_gather
from .ops.patch_pool import patch_pool
from .ops.rowwise_adagrad_update import rowwise_adagrad_update
from .ops.segment import calibrate_threshold, segment, segment_fixed, segment_spaces
from .ops.segment_logits import segment_logits
from .version import __version__

__all__ = [
    "HASH_PRIMES",
    "PatchLayout",
    "__version__",
    "available_backends",
    "build_info",
    "calibrate_threshold",
    "decoder_cross_attention",
    "encoder_cross_attention",
    "entropy",
    "hash_ngram_embedding",
    "hash_ngram_embedding_row_grad",
    "hash_ngram_ids",
    "keep_coalesced",
    "linear_entropy",
    "patch_gather",
    "patch_pool",
    "rowwise_adagrad_update",
    "segment",
    "segment_fixed",
    "segment_logits",
    "segment_spaces",
    "use_backend",
]
