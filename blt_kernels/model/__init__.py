"""A Byte Latent Transformer and its entropy model, thin over the ops of `blt_kernels`."""

from .blt import BLT, latent_capacity
from .config import BLTConfig, EntropyModelConfig, TransformerConfig
from .entropy_model import EntropyModel
from .loss import NextByteLoss, next_byte_loss

__all__ = [
    "BLT",
    "BLTConfig",
    "EntropyModel",
    "EntropyModelConfig",
    "NextByteLoss",
    "TransformerConfig",
    "latent_capacity",
    "next_byte_loss",
]
