"""Writes the tables of docs/training.md: `python docs/costs.py`. A test checks that they are those of the formulas."""

from __future__ import annotations

from pathlib import Path

from blt_kernels.model import BLTConfig
from blt_kernels.training.costs import rank_costs

PAGE = Path(__file__).with_name("training.md")
BEGIN, END = "<!-- costs: begin (python docs/costs.py) -->\n", "<!-- costs: end -->\n"
ROW_TOKENS = 32768
RUNS = [(preset, ranks) for preset in ("1B", "7B") for ranks in (8, 64)]


def tables() -> str:
    costs = [rank_costs(BLTConfig.preset(preset), ranks, row_tokens=ROW_TOKENS) for preset, ranks in RUNS]
    gib = 2**30

    def rows(kind: str) -> list[str]:
        parts = [getattr(cost, kind) for cost in costs]
        lines = [_row(name, [f"{part[name] / gib:.2f}" for part in parts]) for name in parts[0]]
        return [*lines, _row("**in all**", [f"**{sum(part.values()) / gib:.1f}**" for part in parts])]

    def counts(name: str, value: str) -> str:
        return _row(name, [f"{getattr(cost, value):,}" for cost in costs])

    names = [f"{preset}, {ranks} ranks" for preset, ranks in RUNS]
    lines = [
        _row(f"GiB a rank holds, N = {ROW_TOKENS}", names),
        _row("---", ["---:" for _ in names]),
        *rows("memory"),
        "",
        _row("GiB a rank receives in a step of one lane", names),
        _row("---", ["---:" for _ in names]),
        *rows("received"),
        "",
        _row("work of a rank for the tables", names),
        _row("---", ["---:" for _ in names]),
        counts("ranks of a table group, T", "table_group"),
        counts("tokens hashed, T N", "hashed"),
        counts("rows read and sorted, 6 T N", "sorted"),
    ]
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """`text` with the tables of today between the marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + tables() + "\n" + END + after


def _row(name: str, cells: list[str]) -> str:
    return f"| {' | '.join([name, *cells])} |"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
