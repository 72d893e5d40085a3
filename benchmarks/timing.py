"""How long a call takes and how much memory it needs, on the CPU and on a GPU.

CPU: `torch.utils.benchmark.Timer` with a pinned number of threads, several calls a sample.

GPU: device events around the replay of a CUDA graph that holds the call, so that launches from Python do not count.
Before every call a buffer of twice the L2 cache is read: the call finds its inputs in memory, and none of its time is
spent on writing back what others left in the L2. A call that waits for the device cannot be captured: it is launched as
it is, and its row says so.
"""

from __future__ import annotations

import contextlib
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

ROUND_SECONDS = 0.02  # a call is repeated as often in a sample as fits, at least once
GPU_CALLS = 5  # calls of a sample on a GPU, each with a cold L2
FLUSHES = 6  # reads of the buffer: the device is still busy with them when the event and the graph are submitted


class Measured:
    """A call that can be timed. `graph`, on a GPU: whether a CUDA graph replays it."""

    def __init__(self, call: Callable[[], Any], device: torch.device, *, graph: bool = True):
        self.graph: bool | None = None
        if device.type == "cuda":
            self._replay, self.graph = _capture(call) if graph else (call, False)
            self._flush = torch.zeros(2 * torch.cuda.get_device_properties(device).L2_cache_size // 4, device=device)
        else:
            self._timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            self._calls = max(1, int(ROUND_SECONDS / max(self._timer.timeit(1).median, 1e-7)))

    def sample(self) -> float:
        """Seconds of one call."""
        return self._sample_cpu() if self.graph is None else self._sample_gpu()

    def _sample_cpu(self) -> float:
        if self._calls > 1:
            self._timer.timeit(1)  # the caches hold this call's data, not the previous one's
        return self._timer.timeit(self._calls).median

    def _sample_gpu(self) -> float:
        events = []
        for _ in range(GPU_CALLS):
            for _ in range(FLUSHES):
                self._flush.sum()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._replay()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def _capture(call: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
    """A graph of `call` and True; `call` itself and False where it waits for the device.

    Raises:
        RuntimeError: it does not wait and cannot be captured all the same. What this process measured after that would
            not be right.
    """
    for _ in range(2):
        call()
    if (reason := wait_for_device(call)) is not None:
        warnings.warn(f"not captured in a CUDA graph, timed with its launches: {reason}", stacklevel=2)
        return call, False
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay, True


def wait_for_device(call: Callable[[], Any]) -> str | None:
    """What torch says of the first place where `call` waits for the device; None where it does not.

    This is found out before a capture, because a capture that fails leaves torch's allocator in the middle of it.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return None


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Where cases are built and run: on a GPU a stream of its own, since the default one cannot be captured, and a
    backward pass runs on the stream of its forward pass."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        yield


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that one call holds at once beside what is there before it, results included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    assert profiler.profiler is not None
    for event in profiler.profiler.kineto_results.events():  # type: ignore[attr-defined]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def format_seconds(seconds: float) -> str:
    """As milliseconds, or as microseconds where it is less than a tenth of one."""
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.2f} us"
