"""Checkpoints of any kind, in and out: our own runs, and the formats in which BLTs are published."""

from .load import from_pretrained, load_any
from .save import save_pretrained

__all__ = ["from_pretrained", "load_any", "save_pretrained"]
