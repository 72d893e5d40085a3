"""The process in which one op is measured in one environment: see `harness.measure`, which starts it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .harness import Case, Setting, describe_machine, run


def main(op: str, path: str, device: str, quick: bool, rounds: int, case: str) -> None:
    torch.manual_seed(0)
    cases: Callable[[Setting], Iterator[Case]] = importlib.import_module(f"benchmarks.ops.{op}").cases
    place = torch.device(device)
    facts = describe_machine(place)  # here, where the threads are those that measure
    measured = run(cases(Setting(place, quick)), place, rounds, case)
    Path(path).write_text(json.dumps({"facts": facts, "rows": measured}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
