"""Generation with caches: a byte costs a step of the local models, and a patch a step of the latent transformer."""

from .generate import as_text, generate, stream, stream_bytes
from .sampling import SamplingConfig
from .state import GenerationState

__all__ = ["GenerationState", "SamplingConfig", "as_text", "generate", "stream", "stream_bytes"]
