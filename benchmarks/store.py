"""Measured results as JSON files: written whole, refused when damaged, compared with earlier ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machine import device_slug
from .ops.cases import label

if TYPE_CHECKING:
    from .ops.measure import Options

FIELDS = ("op", "device", "dtype", "torch", "commit", "date", "quick", "case", "rows")
ROW_FIELDS = (
    "environment", "case", "shapes", "headline", "sweep", "variant", "seconds", "quartiles", "rounds", "gb_per_second",
    "fraction_of_copy", "peak_bytes",
)  # fmt: skip
# A change of time counts if it is more than this factor and the quartiles of old and new do not meet.
NOTABLE = 1.1


def result_path(out: Path, device: str, op: str) -> Path:
    """Where the result of an op on a device lies."""
    return out / device_slug(device) / f"{op}.json"


def write(result: dict[str, Any], out: Path) -> Path:
    """Puts a result of `measure` at <out>/<device>/<op>.json, whole or not at all."""
    path = result_path(out, result["device"], result["op"])
    write_json(path, result)
    return path


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes atomically: a file that exists is whole."""
    from blt_kernels._files import atomic_path  # here, as `benchmarks gpu` imports this before it builds the library

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A result that `write` has written.

    Raises:
        ValueError: says which file is damaged, and how.
    """
    try:
        result = json.loads(Path(path).read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable result: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path}: expected an object, got {type(result).__name__}")
    if missing := [field for field in FIELDS if field not in result]:
        raise ValueError(f"{path}: not a result of a kernel benchmark: it has no {', '.join(missing)}")
    for i, row in enumerate(result["rows"]):
        if missing := [field for field in ROW_FIELDS if field not in row]:
            raise ValueError(f"{path}: row {i} has no {', '.join(missing)}")
    return result


def refuse_to_lose(path: Path, options: Options) -> None:
    """Refuses to measure less than the result at `path` holds, which would be replaced.

    Two runs are never merged, because a result has one commit, one date and one machine for all of its rows.

    Raises:
        ValueError: says what would be lost and what to do; or the file is damaged.
    """
    if not path.exists():
        return
    old = read(path)
    environments = {row["environment"] for row in old["rows"]} - set(options.environments)
    rounds = min(row["rounds"] for row in old["rows"])
    lost = [f"the {name} environment" for name in sorted(environments)]
    if options.case not in ("", old["case"]):
        lost.append(f"cases other than {options.case!r}")
    if options.quick and not old["quick"]:
        lost.append("cases that are not in the short list")
    if options.rounds < rounds:
        lost.append(f"{rounds} rounds of each case instead of {options.rounds}")
    if lost:
        raise ValueError(
            f"{path}: this result holds more than would be measured now and replace it ({'; '.join(lost)}): "
            "choose another --out, or delete the file first"
        )


def compare(old: dict[str, Any], new: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each row that both have: `change` is new over old time, `machine` that ratio for the copy beside it.

    `verdict` is "slower" or "faster" where the change in units of the machine's own (change / machine) exceeds
    NOTABLE and the quartiles do not meet, else "same".

    Raises:
        ValueError: they are of different ops, devices or dtypes, or have no case in common.
    """
    for field in ("op", "device", "dtype"):
        if old[field] != new[field]:
            raise ValueError(f"compare: {field}: expected one, got {old[field]!r} and {new[field]!r}")
    before, after = _by_key(old), _by_key(new)
    if not before.keys() & after.keys():
        raise ValueError("compare: rows: expected cases that both have, got none")
    for key in before:
        environment, case, variant = key
        if variant == "copy" or key not in after:
            continue
        a, b = before[key], after[key]
        change = b["seconds"] / a["seconds"]
        copy = (environment, case, "copy")
        machine = after[copy]["seconds"] / before[copy]["seconds"]
        apart = b["quartiles"][0] > a["quartiles"][1] or b["quartiles"][1] < a["quartiles"][0]
        relative = change / machine
        verdict = "same"
        if apart and min(change, relative) > NOTABLE:
            verdict = "slower"
        elif apart and max(change, relative) < 1 / NOTABLE:
            verdict = "faster"
        yield {
            "environment": environment,
            "case": case,
            "variant": variant,
            "seconds": [a["seconds"], b["seconds"]],
            "change": change,
            "machine": machine,
            "verdict": verdict,
        }


def _by_key(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(row["environment"], label(row["case"], row["shapes"]), row["variant"]): row for row in result["rows"]}
