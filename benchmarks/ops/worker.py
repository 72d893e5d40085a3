"""The process in which one op is measured in one environment: `measure.measure` starts it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..machine import describe_machine
from .cases import Case, Setting
from .measure import run


def main(op: str, path: str, device: str, quick: bool, rounds: int, case: str) -> None:
    torch.manual_seed(0)
    cases: Callable[[Setting], Iterator[Case]] = importlib.import_module(f"benchmarks.ops.{op}").cases
    setting = Setting(torch.device(device), quick)
    # The facts are collected in this process, because its threads are those that measure.
    facts = describe_machine(setting.device) | {"dtype": str(setting.dtype).removeprefix("torch.")}
    measured = run(cases(setting), setting.device, rounds, case)
    Path(path).write_text(json.dumps({"facts": facts, "rows": measured}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
