"""A Byte Latent Transformer and its entropy model, thin over the ops of `blt_kernels`."""

from .activations import checkpoint_activations
from .blt import BLT
from .config import BLTConfig, EntropyModelConfig, RopeScaling, TransformerConfig
from .entropy_model import EntropyModel
from .loss import NextByteLoss, bits_per_byte, next_byte_loss

__all__ = [
    "BLT",
    "BLTConfig",
    "EntropyModel",
    "EntropyModelConfig",
    "NextByteLoss",
    "RopeScaling",
    "TransformerConfig",
    "bits_per_byte",
    "checkpoint_activations",
    "next_byte_loss",
]
