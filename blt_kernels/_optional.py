"""Packages of the extra `train`, imported where they are used, so that the ops need torch and numpy alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def optional(module: str, purpose: str = "") -> Any:
    """Imports `module`, or raises ImportError that says how to get it and, where given, the `purpose` it is for."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        absent = (error.name or "").partition(".")[0] == package
        state = "is missing" if absent else f"cannot be imported ({error})"
        prefix = f"{purpose}: " if purpose else ""
        raise ImportError(f"{prefix}{package} {state}: pip install 'blt_kernels[train]'") from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure (inches) that renders to files: no pyplot, no global state, no display."""
    figure = optional("matplotlib.figure").Figure(figsize=(width, height))
    optional("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure
