"""What the counts in csrc/cuda/budget.json predict for GPUs: the table of docs/design.md.

An op is slower than a copy of the bytes that it must move where one of these limits is reached first:

- issue: a multiprocessor issues at most 4 warp instructions a clock, one in each quarter.
- ALU, special functions: each quarter has one of these pipes, which a warp instruction occupies for 2 or 8 cycles.
- exchange: shuffles and accesses to shared memory pass through one unit, one a clock.
- latency: so many bytes must be under way in a multiprocessor that memory never waits for requests.

Of what a unit can do at most, 2.5 / 4 is taken to be reachable. What caches serve or cost is unknown until a GPU says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..machine import REPOSITORY
from .table import Table

BUDGET = REPOSITORY / "csrc" / "cuda" / "budget.json"

# Bytes that a multiprocessor reads and writes in a clock of a copy.
BYTES_A_CLOCK = {"H100": 11.5, "H200": 16.4, "B200": 28.0}
REACHABLE = 2.5 / 4
QUARTERS = 4
BYTES_IN_FLIGHT = 40e3  # that hide the latency; taken to be the same for all GPUs
SHOWN = ("bfloat16", "float32", "int32")  # an op is shown in the first of these that it is counted in

Figures = dict[str, Any]


def main_kernel(figures: Figures) -> Figures:
    """The kernel of an op that accesses the most memory."""
    return max(figures["kernels"].values(), key=lambda kernel: kernel["accessed"])


def shares(figures: Figures, bytes_a_clock: float) -> dict[str, float]:
    """For each limit the share of a copy's speed that it leaves to an op; above 1 where it is not reached."""
    costs = figures["all"]
    clocks = {
        "issue": costs["instructions"] / QUARTERS,
        "ALU": costs["alu_cycles"] / QUARTERS,
        "special functions": costs["special_cycles"] / QUARTERS,
        "exchange": costs["shuffles"] + costs["shared_wavefronts"],
    }
    found = {limit: REACHABLE / (of * bytes_a_clock) for limit, of in clocks.items() if of > 0}
    return found | {"latency": main_kernel(figures)["bytes_in_flight"] / BYTES_IN_FLIGHT}


def predicted(figures: Figures, bytes_a_clock: float) -> str:
    """Such as "24%, issue": the least of the limits."""
    limit, share = min(shares(figures, bytes_a_clock).items(), key=lambda item: item[1])
    return f"{share:.0%}, {limit}" if share < 1 else "up to 100%"


def achieved(name: str, kernels: Mapping[str, dict[str, Any]]) -> str:
    """What the headline cases of an op measured on GPUs.

    Args:
        name: such as "patch_pool, max, backward, bfloat16".
        kernels: results of the ops on GPUs, by "<device> <op>".
    """
    op, *rest = name.split(", ")
    backward = any("backward" in part for part in rest)
    found = []
    for key, result in kernels.items():
        device, _, of = key.rpartition(" ")
        for row in result["rows"] if of == op else ():
            if row["headline"] and row["variant"] == "ours" and ("backward" in row["case"]) == backward:
                found.append(f"{device}, {row['case']}: {row['fraction_of_copy']:.0%}")
    return "; ".join(found) or "not measured"


def table(kernels: Mapping[str, dict[str, Any]]) -> Table:
    """Each op in the narrowest dtype that it is counted in; `kernels` as in `achieved`."""
    columns = ("op", "bytes that must move", "instructions a byte", "KB in flight", *BYTES_A_CLOCK, "achieved")
    rows, seen = [], set()
    ops: dict[str, Figures] = json.loads(BUDGET.read_text())["ops"]
    for name, figures in sorted(ops.items(), key=lambda item: SHOWN.index(item[0].rpartition(", ")[2])):
        shape = name.rpartition(", ")[0]
        if shape in seen:
            continue
        seen.add(shape)
        op, _, rest = shape.partition(", ")
        rows.append(
            (
                f"`{op}`" + (f", {rest}" if rest else ""),
                figures["moves"],
                f"{figures['all']['instructions']:.2g}",
                f"{main_kernel(figures)['bytes_in_flight'] / 1e3:.0f}",
                *(predicted(figures, rate) for rate in BYTES_A_CLOCK.values()),
                achieved(name, kernels),
            )
        )
    return Table("What the compiled kernels cost, and the share of a copy's speed that this predicts", columns, rows)
