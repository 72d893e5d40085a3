"""Where the command line prints: results to stdout, messages to stderr, and text as text, whatever it contains."""

from __future__ import annotations

from typing import Any

from rich.console import Console

# Paths, keys and messages come from users and may contain what rich would take for markup ("[/INST]") or emoji (":x:").
_TEXT_IS_TEXT = {"markup": False, "emoji": False, "highlight": False}
console = Console(**_TEXT_IS_TEXT)  # type: ignore[arg-type]
messages = Console(stderr=True, **_TEXT_IS_TEXT)  # type: ignore[arg-type]


def printable(text: object) -> str:
    """`text` in which characters that are not printable are escaped as in `repr`: they could drive the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(text))


def say(where: Console, text: str) -> None:
    """Prints one line and does not wrap it, so that a path in it can be copied."""
    where.print(printable(text), soft_wrap=True)


def say_warning(message: Warning | str, *_: Any) -> None:
    """A warning as one line on stderr: the line of code that gave it says nothing to a user."""
    say(messages, f"warning: {' '.join(str(message).split())}")


def describe(error: Exception) -> str:
    """An error as one line: its own words, and its type where the words alone would be a riddle."""
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = f"out of memory {error}"
    elif isinstance(error, (ValueError, TypeError, ImportError, FloatingPointError, OSError, RuntimeError)):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (BLT_KERNELS_DEBUG=1 shows where)"
    return printable(" ".join(text.split()))
