"""Made-up results of kernel benchmarks, in the form of their JSON."""

from __future__ import annotations

from typing import Any


def kernel_result(
    seconds: dict[str, float], *, op: str = "patch_pool", spread: float = 0.01, n: int = 16384, headline: str = "readme"
) -> dict[str, Any]:
    """The result of an op with one case, whose variants take `seconds`."""
    rows = [
        {
            "environment": "measuring",
            "case": "forward",
            "shapes": {"B": 1, "N": n, "D": 1024, "patches": "text 4.5"},
            "headline": headline,
            "sweep": n,
            "variant": variant,
            "seconds": value,
            "quartiles": [value * (1 - spread), value * (1 + spread)],
            "rounds": 15,
            "fraction_of_copy": seconds["copy"] / value,
            "gb_per_second": 1e-9 / value,
            "slower_than_first": value / seconds.get("ours", value),
            "peak_bytes": 1_000_000,
        }
        for variant, value in seconds.items()
    ]
    facts = {
        "device": "Some CPU, 2 cores",
        "dtype": "float32",
        "torch": "2.13.0",
        "commit": "abc",
        "date": "2026-01-01",
        "quick": False,
        "case": "",
    }
    return {"op": op, **facts, "environments": {}, "rows": rows}
