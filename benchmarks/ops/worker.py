"""The process in which one op is measured in one environment: `measure.measure` starts it."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator

import torch
import torch._dynamo.config
import torch._functorch.config

from ..machine import describe_machine
from .cases import Case, Setting
from .measure import run

# A backward graph is built once and run again and again, which donated buffers forbid.
torch._functorch.config.donated_buffer = False
# Beyond its limit of shapes torch.compile would run the baseline eagerly without a word.
torch._dynamo.config.recompile_limit = 1000
torch._dynamo.config.fail_on_recompile_limit_hit = True


def main(op: str, device: str, quick: bool, tiny: bool, rounds: int, case: str) -> None:
    """Writes a line of JSON to stdout after each case: the facts and the case's rows."""
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not come between the lines
    torch.manual_seed(0)
    cases: Callable[[Setting], Iterator[Case]] = importlib.import_module(f"benchmarks.ops.{op}").cases
    setting = Setting(torch.device(device), quick, tiny)
    # The facts are collected in this process, because its threads are those that measure.
    facts = describe_machine(setting.device) | {"dtype": str(setting.dtype).removeprefix("torch.")}
    for rows in run(cases(setting), setting.device, rounds, case):
        print(json.dumps({"facts": facts, "rows": rows}), file=lines)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
