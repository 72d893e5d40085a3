"""`python -m blt_kernels` is `blt-kernels`."""

from .cli import entry_point

entry_point()
