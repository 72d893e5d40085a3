"""The definition of every op in a few readable lines of PyTorch: any device, any float dtype, differentiable."""

from .entropy import entropy
from .linear_entropy import linear_entropy

__all__ = [
    "entropy",
    "linear_entropy",
]
