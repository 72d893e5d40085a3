"""From the name of a device, as `--device` takes it, to the device that a process computes on."""

from __future__ import annotations

import os
import re
import warnings

import torch

from ._checks import fail_type, fail_value
from .backend import cuda_problem

_NAMES = "auto, cpu, cuda or cuda:i"


def resolve_device(name: str | torch.device) -> torch.device:
    """The device that this process computes on. A GPU becomes the current one, which collectives and others ask for.

    Args:
        name: "cpu"; "cuda:i", the GPU i; "cuda", the GPU of this process; "auto", the GPU of this process if its
            kernels run, else the CPU. The GPU of a process that torchrun has started is that of its local rank. Of any
            other process it is the first one for "cuda" and the first one whose kernels run for "auto". With torchrun
            "auto" takes GPUs where there is one for each process of this machine and the kernels run on all of them.

    Returns:
        A CPU device, or a CUDA device with its index.

    Raises:
        TypeError: `name` is neither text nor a device.
        ValueError: it is none of these names, there is no GPU of that index, or it would put several processes of
            torchrun on one GPU.
    """
    if not isinstance(name, (str, torch.device)):
        raise fail_type("resolve_device", "device", f"one of {_NAMES}", repr(name))
    name = str(name)
    if name == "cpu":
        return torch.device("cpu")
    device = _first_that_runs() if name == "auto" else _gpu_of(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _gpu_of(name: str) -> torch.device:
    if not re.fullmatch(r"cuda(:\d{1,4})?", name):
        raise fail_value("resolve_device", "device", f"one of {_NAMES}", repr(name))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise fail_value("resolve_device", "device", "cpu, because torch sees no GPU here", name)
    rank = local_rank()
    if name != "cuda" and _ranks_here() > 1:
        what = f"cuda, which gives each of the {_ranks_here()} processes of torchrun a GPU of its own"
        raise fail_value("resolve_device", "device", what, name)
    index = int(name.removeprefix("cuda:")) if name != "cuda" else rank or 0
    if index >= count:
        asked = f"{name} in the process of local rank {rank}" if name == "cuda" else name
        raise fail_value("resolve_device", "device", f"one of the {count} GPUs, cuda:0 to cuda:{count - 1}", asked)
    return torch.device("cuda", index)


def local_rank() -> int | None:
    """The number of this process among those that torchrun has started on this machine; None without torchrun."""
    value = os.environ.get("LOCAL_RANK")
    return None if value is None else int(value)


def _ranks_here() -> int:
    """How many processes torchrun has started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", (local_rank() or 0) + 1))


def _first_that_runs() -> torch.device:
    """The GPU of this process, or the CPU. All processes of torchrun on a machine take the same kind of device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {torch.device("cuda", index): cuda_problem(torch.device("cuda", index)) for index in range(count)}
    problems = [f"{device}: {problem}" for device, problem in found.items() if problem is not None]
    rank = local_rank()
    if rank is None:
        usable = next((device for device, problem in found.items() if problem is None), None)
    else:
        mine = list(found)[: _ranks_here()]
        if len(mine) < _ranks_here():
            problems = [f"{_ranks_here()} processes have {count} GPUs"]
        usable = None if any(found[device] for device in mine) or len(mine) < _ranks_here() else mine[rank]
    if usable is None and found:
        warnings.warn(
            f"device auto takes the CPU, because the CUDA kernels cannot run here: {'; '.join(problems)}", stacklevel=3
        )
    return usable or torch.device("cpu")
