"""Generation with caches: a byte costs a step of the local models, and a patch a step of the latent transformer."""

from .generate import generate, stream
from .sampling import SamplingConfig
from .state import GenerationState

__all__ = ["GenerationState", "SamplingConfig", "generate", "stream"]
