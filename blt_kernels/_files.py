"""Files that are written whole or not at all, and errors that name the file."""

from __future__ import annotations

import contextlib
import os
import shutil
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


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a directory to fill, beside `path`; it becomes `path` when the block ends and its files are on disk.

    If the block raises, nothing is left of it.

    Raises:
        ValueError: there is something at `path` already, other than an empty directory.
        OSError: it cannot be written; names the path.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: expected a directory to make, got one that holds something, or a file")
    path = path.resolve()  # behind a link lies the directory to make
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        with naming(path):
            partial.mkdir(parents=True)
            yield partial
            for file in (*partial.rglob("*"), partial):
                flush(file)
            partial.replace(path)
            flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until a file (or the names in a directory) is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
