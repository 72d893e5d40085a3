"""The ranks of a run: the processes that torchrun has started, and what they tell each other.

A rank is a process, and the first one, rank 0, writes and speaks for all. Without torchrun there is one rank, and every
function here does without torch.distributed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from .._checks import fail_value

T = TypeVar("T")


class RankLostError(RuntimeError):
    """Another rank has ended, so that this one cannot go on."""


class FirstRankFailedError(RuntimeError):
    """Rank 0 could not do what the others wait for. It has said why."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """In the block the processes of torchrun are ranks of one run: they talk by gloo, and tensors on GPUs by nccl.

    Raises:
        RankLostError: a rank has ended before the block has.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    with _naming_a_lost_rank():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        yield
        sum_over_ranks([0])  # a rank that leaves early would look lost to the others; a barrier could take their GPUs
    dist.destroy_process_group()


@contextlib.contextmanager
def _naming_a_lost_rank() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo raises no type of its own
        words = str(error)
        if isinstance(error, dist.DistError) or "gloo" in words or "Connection closed by peer" in words:
            raise RankLostError(
                f"rank {rank()} of {world_size()} stops, because another rank has ended; the last checkpoint stands, "
                "and --resume continues from it, with any number of ranks that divides the lanes"
            ) from error
        raise


def _is_one_of_many() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process among the ranks; 0 without torchrun."""
    return dist.get_rank() if _is_one_of_many() else 0


def world_size() -> int:
    """How many ranks there are; 1 without torchrun."""
    return dist.get_world_size() if _is_one_of_many() else 1


def is_first() -> bool:
    return rank() == 0


def lanes_of_rank(num_lanes: int) -> range:
    """The lanes that this rank runs: an equal share of them.

    Raises:
        ValueError: the ranks do not divide the lanes.
    """
    each, rest = divmod(num_lanes, world_size())
    if rest:
        raise fail_value("train", "lanes", f"a multiple of the {world_size()} ranks of torchrun", num_lanes)
    return range(rank() * each, (rank() + 1) * each)


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, which alone calls it, on every rank: what must be equal everywhere, or done once.

    Raises:
        FirstRankFailedError: on the other ranks, where `make` has raised. Rank 0 raises what `make` did.
    """
    if not _is_one_of_many():
        return make()
    told: list[Any] = [None, False]
    failure: Exception | None = None
    if is_first():
        try:
            told = [make(), True]
        except Exception as error:
            failure = error
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if not told[1]:
        raise FirstRankFailedError("rank 0 has failed")
    return cast(T, told[0])


def from_all(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks, on every rank."""
    if not _is_one_of_many():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(numbers: Sequence[int]) -> list[int]:
    """The sum of each number over all ranks."""
    if not _is_one_of_many():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(total)
    return [int(number) for number in total]


def sum_of_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, on its device; without a graph."""
    if _is_one_of_many():
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor)
    return tensor
