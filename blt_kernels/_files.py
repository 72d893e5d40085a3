"""Files that are written whole or not at all, and errors that name the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds `path` to an OSError of the block that names no file: a full disk, for one, does not say what it held."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a name to write to, beside `path`; what was written there becomes `path` when the block ends.

    If the block raises, `path` is what it was before, and nothing is left beside it. A pipe or a device is written
    directly, because it has no contents to protect.

    Raises:
        OSError: the file cannot be written; names `path`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with naming(path):
            yield path
        return
    target = path.resolve()  # behind a link lies the file to replace
    partial = target.with_name(f".{target.name}.partial")
    try:
        with naming(path):
            yield partial
            partial.replace(target)
    except OSError as error:
        if error.filename == str(partial):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
