"""Measured results as JSON files: written whole, refused when damaged, compared with earlier ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machine import device_slug
from .ops.cases import label

if TYPE_CHECKING:
    from .ops.measure import Options

FIELDS = {
    "op": str, "device": str, "dtype": str, "torch": str, "commit": str, "date": str, "quick": bool, "case": str,
    "rows": list,
}  # fmt: skip
ROW_FIELDS = {
    "environment": str, "case": str, "shapes": dict, "headline": object, "sweep": object, "variant": str,
    "seconds": float, "quartiles": list, "rounds": int, "gb_per_second": float, "fraction_of_copy": float,
    "peak_bytes": int,
}  # fmt: skip
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


def write_partial(result: dict[str, Any], out: Path) -> Path:
    """Puts what an op has until now at <out>/<device>/<op>.partial.json, which is there if its run is cut short."""
    path = result_path(out, result["device"], result["op"]).with_suffix(".partial.json")
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
    _check_fields(f"{path}: not a result of a kernel benchmark", result, FIELDS)
    for i, row in enumerate(result["rows"]):
        _check_fields(f"{path}: row {i}", row, ROW_FIELDS)
        times = [row["seconds"], *row["quartiles"]]
        if len(times) != 3 or not all(isinstance(time, float) and 0 < time < math.inf for time in times):
            raise ValueError(f"{path}: row {i}: expected a time and two quartiles above 0, got {times}")
    keys = _by_key(result).keys()
    without_copy = {key[:2] for key in keys} - {key[:2] for key in keys if key[2] == "copy"}
    if without_copy:
        raise ValueError(f"{path}: no row of the variant copy for {', '.join(map(' '.join, sorted(without_copy)))}")
    return result


def _check_fields(where: str, found: Any, fields: dict[str, type]) -> None:
    """Refuses what is not an object with these fields."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object, got {type(found).__name__}")
    if missing := [field for field in fields if field not in found]:
        raise ValueError(f"{where}: it has no {', '.join(missing)}")
    for field, kind in fields.items():
        if not isinstance(found[field], kind):
            raise ValueError(f"{where}: {field}: expected {kind.__name__}, got {found[field]!r}")


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
    if options.tiny and not old.get("tiny"):
        lost.append("sizes that a time can be measured at")
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
