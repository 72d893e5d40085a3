"""Checkpoints of any kind, in and out: our own runs, and the formats in which BLTs are published."""

from .load import load_any

__all__ = ["load_any"]
