"""`python -m benchmarks overhead`: what a call costs where there is next to nothing to compute.

Every public function on a few bytes: microseconds of a call, of forward and backward together, and of the compiled op
alone, and how many checks in Python a call makes. Two functions of torch stand beside them. The times are CPU time of
one thread, so that the turns of other processes do not count; the least of many interleaved rounds is shown, because a
busy machine can only add to it, and the median beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import blt_kernels as bk

from .machine import describe_machine, device_slug
from .report.table import Table
from .store import write_json

FILE = "overhead.json"
GOALS = {"call": 15e-6, "both": 80e-6}  # seconds: of a call, of forward and backward
ROWS, BYTES, SLOTS, WIDTH, VOCABULARY = 1, 8, 4, 8, 9
KINDS = ("raw", "call", "both")


@dataclasses.dataclass(frozen=True)
class Case:
    """One function on tiny inputs.

    Attributes:
        function: its public name.
        call: the function of one argument, which can be differentiated by it where `both`.
        x: that argument.
        raw: the compiled op, called with the same tensors; None for a function of torch.
    """

    function: str
    call: Callable[[torch.Tensor], Any]
    x: torch.Tensor
    raw: Callable[[], Any] | None
    both: bool = True


def cases() -> Iterator[Case]:
    ops = torch.ops.blt_kernels
    lengths = torch.tensor([[1, 3, 2, 2]])
    layout = bk.PatchLayout.from_lengths(lengths, BYTES)
    offsets, sequences, visible = layout.offsets, layout.cu_patches, layout.visible_ids
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    x, y = rand(ROWS, BYTES, WIDTH), rand(ROWS, SLOTS, WIDTH)
    of_bytes, of_slots = rand(ROWS, BYTES, 1, WIDTH), rand(ROWS, SLOTS, 1, WIDTH)
    logits, head, entropies = rand(ROWS, BYTES, VOCABULARY), rand(VOCABULARY, WIDTH), rand(ROWS, BYTES)
    tokens, table = torch.arange(ROWS * BYTES).view(ROWS, BYTES), rand(2 * 16, WIDTH)
    sizes, num_rows, primes = [3, 4], 16, list(bk.HASH_PRIMES[:1])
    segment_arguments = (1.0, "threshold", None, None, None, None, True, None)
    yield Case("patch_pool", lambda x: bk.patch_pool(x, layout), x, lambda: ops.patch_pool(x, offsets, "max"))
    yield Case("patch_gather", lambda y: bk.patch_gather(y, layout), y, lambda: ops.patch_gather(y, visible))
    yield Case(
        "encoder_cross_attention",
        lambda k: bk.encoder_cross_attention(of_slots, k, of_bytes, layout),
        of_bytes,
        lambda: ops.encoder_cross_attention(of_slots, of_bytes, of_bytes, offsets, sequences, None, 1),
    )
    yield Case(
        "decoder_cross_attention",
        lambda q: bk.decoder_cross_attention(q, of_slots, of_slots, layout),
        of_bytes,
        lambda: ops.decoder_cross_attention(of_bytes, of_slots, of_slots, visible, offsets, sequences, None, 1),
    )
    yield Case(
        "hash_ngram_embedding",
        lambda table: bk.hash_ngram_embedding(tokens, table, ngram_sizes=sizes, num_rows=num_rows),
        table,
        lambda: ops.hash_ngram_embedding(tokens, table, None, sizes, num_rows, primes, None, False, False),
    )
    yield Case("entropy", bk.entropy, logits, lambda: ops.entropy(logits))
    yield Case("linear_entropy", lambda x: bk.linear_entropy(x, head), x, lambda: ops.linear_entropy(x, head))
    yield Case(
        "segment_logits",
        lambda logits: bk.segment_logits(logits, 1.0)[0],
        logits,
        lambda: ops.segment_logits(logits, *segment_arguments),
    )
    yield Case(
        "segment",
        lambda entropies: bk.segment(entropies, 1.0),
        entropies,
        lambda: ops.segment(entropies, *segment_arguments),
        both=False,
    )
    yield Case(
        "PatchLayout.from_lengths",
        lambda lengths: bk.PatchLayout.from_lengths(lengths, BYTES),
        lengths,
        lambda: ops.layout_from_lengths(lengths, BYTES, None, None, None),
        both=False,
    )
    attention = torch.nn.functional.scaled_dot_product_attention
    yield Case("torch: scaled_dot_product_attention", lambda q: attention(q, of_bytes, of_bytes), of_bytes, None)
    yield Case("torch: 2 * x", lambda x: 2 * x, x, None)


def calls_of(case: Case) -> dict[str, Callable[[], Any]]:
    """What is timed, by kind: the compiled op, the call, and forward with backward."""
    found: dict[str, Callable[[], Any]] = {"call": lambda: case.call(case.x)}
    if case.raw is not None:
        found["raw"] = case.raw
    if case.both:
        leaf = case.x.clone().requires_grad_()
        grad = torch.ones_like(case.call(leaf))
        found["both"] = lambda: torch.autograd.grad(case.call(leaf), leaf, grad)
    return found


def count_checks(call: Callable[[], Any]) -> int:
    """How many of our functions that are named check are called. A question that such a function answers by itself,
    without calling another, does not count again."""
    count = 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        ours = frame.f_globals.get("__name__", "").startswith("blt_kernels")
        count += event == "call" and ours and frame.f_code.co_name.lstrip("_").startswith("check")

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def measure(rounds: int, calls: int) -> dict[str, Any]:
    """A result: for each function the least and the median over `rounds` of the seconds of a call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.disable()  # as timeit does: collections fall to whichever call comes next
    try:
        timed = [(case, calls_of(case)) for case in cases()]
        samples = {(case.function, kind): [] for case, kinds in timed for kind in kinds}
        for number in range(rounds + 1):
            for case, kinds in timed:
                for kind, call in kinds.items():
                    begin = time.thread_time()
                    for _ in range(calls):
                        call()
                    if number:  # The first round warms up.
                        samples[case.function, kind].append((time.thread_time() - begin) / calls)
            gc.collect()
        facts = describe_machine(torch.device("cpu"))
    finally:
        gc.enable()
        torch.set_num_threads(threads)
    rows = []
    for case, kinds in timed:
        row: dict[str, Any] = {"function": case.function, "checks": count_checks(kinds["call"])}
        for kind in kinds:
            times = samples[case.function, kind]
            row[kind] = {"least": min(times), "median": statistics.median(times)}
        rows.append(row)
    return {**facts, "rounds": rounds, "calls": calls, "rows": rows}


def read(path: Path) -> dict[str, Any]:
    """A result that `main` has written.

    Raises:
        ValueError: says which file is damaged, and how.
    """
    try:
        result = json.loads(path.read_text())
        for row in result["rows"]:
            times = [row[kind][which] for kind in KINDS if kind in row for which in ("least", "median")]
            if not all(isinstance(time, float) and 0 < time < math.inf for time in times):
                raise ValueError(f"{row['function']}: expected times above 0, got {times}")
        table(result)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a result of `benchmarks overhead`: {error!r}") from error
    return result


def table(result: dict[str, Any]) -> Table:
    """A line for each function: least microseconds, and the median in brackets."""

    def cell(row: dict[str, Any], kind: str) -> str:
        if kind not in row:
            return ""
        times = row[kind]
        return f"{times['least'] * 1e6:.1f} ({times['median'] * 1e6:.1f})"

    lines = [
        (_name(row), str(row["checks"]), *(cell(row, kind) for kind in KINDS), _verdict(row)) for row in result["rows"]
    ]
    title = (
        f"Microseconds on {result['device']}, torch {result['torch']}: the least of {result['rounds']} rounds of "
        f"{result['calls']} calls, and the median"
    )
    columns = ("function", "checks in Python", "compiled op", "a call", "forward and backward", "goals met")
    return Table(title, columns, lines)


def _name(row: dict[str, Any]) -> str:
    return f"`{row['function']}`" if "raw" in row else row["function"]


def _verdict(row: dict[str, Any]) -> str:
    """Which goals the least times reach; nothing for the functions of torch, which have none."""
    if "raw" not in row:
        return ""
    met = {kind: row[kind]["least"] <= goal for kind, goal in GOALS.items() if kind in row}
    return " and ".join("yes" if good else "no" for good in met.values())


def section(result: dict[str, Any]) -> list[str]:
    """Markdown for docs/results.md."""
    goals = (
        f"Goals: {GOALS['call'] * 1e6:.0f} us for a call, {GOALS['both'] * 1e6:.0f} us for forward and backward, which "
        "includes torch.autograd.grad itself."
    )
    shown = table(result)
    return ["### What a call costs on tiny inputs", f"{shown.title}. {goals}", shown.markdown()]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="interleaved repeats (default: 40)")
    parser.add_argument("--calls", type=int, default=200, help="calls of a function in a round (default: 200)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help=f"folder of <device>/{FILE} (default: runs/bench)"
    )
    options = parser.parse_args(arguments)
    for name in ("rounds", "calls"):
        if getattr(options, name) < 1:
            raise ValueError(f"overhead: --{name}: expected at least 1, got {getattr(options, name)}")
    result = measure(options.rounds, options.calls)
    path = options.out.resolve() / device_slug(result["device"]) / FILE
    write_json(path, result)
    table(result).show()
    print(path)
