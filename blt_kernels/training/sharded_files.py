"""Safetensors files of tensors that lie on many ranks, written and read by torch.distributed.checkpoint.

A file holds whole tensors, whatever the number of ranks, so that there is one format of checkpoints: that of one
process. Ranks write their shards side by side, and rank 0 copies them into the file. So a checkpoint is written twice,
by all and by one; in return everything that reads one process's checkpoints reads these, and a run can be continued by
any number of ranks. When reading, each rank takes the slices that it needs.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from .._optional import optional
from .ranks import from_first

# On the CPU it says at every redistribution of a table that it gathers and cuts in place of an all-to-all.
logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)


def write_tensors(path: Path, named: Mapping[str, torch.Tensor]) -> None:
    """Writes `path`, on all ranks together. Tensors are DTensors, or equal on all ranks; each has a dimension.

    Raises:
        OSError: a rank could not write.
    """
    folder = path.with_suffix(".shards")
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    # torch 2.13 loses the value of a tensor without dimensions when it copies shards into a file.
    assert all(tensor.dim() > 0 for tensor in named.values())
    with _one_failure():
        dcp.save({name: tensor.detach() for name, tensor in named.items()}, storage_writer=writer)

    def rename() -> None:
        [file] = folder.glob("*.safetensors")
        file.rename(path)
        shutil.rmtree(folder)

    from_first(rename)


def read_tensors(path: Path, place: Callable[[str], torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The tensors of `path` by name, on all ranks together.

    Args:
        place: from the name of a tensor to where it goes: a DTensor, or None. A tensor that has no place, or one of
            another shape, is read whole, on the CPU.
    """
    tensors: dict[str, torch.Tensor] = {}
    placed: dict[str, torch.Tensor] = {}
    with optional("safetensors").safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, this is no dict
            to = place(name)
            if to is not None and list(to.shape) == file.get_slice(name).get_shape():
                tensors[name] = placed[name] = to
            else:
                tensors[name] = file.get_tensor(name)
    with _one_failure():
        dcp.load(placed, storage_reader=_FileReader(path))
    return tensors


@contextlib.contextmanager
def _one_failure() -> Iterator[None]:
    """Raises what a rank could not do as OSError, on all ranks; torch's own exception lists every rank's traceback."""
    try:
        yield
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {getattr(failure, 'strerror', None) or failure}") from error


class _FileReader(dcp.HuggingFaceStorageReader):
    """Reads one file. Its base reads all of a directory, whose files must not have a name in common."""

    def __init__(self, path: Path):
        super().__init__(str(path.parent))
        reader: Any = self
        reader.fs.ls = lambda folder: [str(path)]
