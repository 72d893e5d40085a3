"""A table as data, for the terminal and for Markdown."""

from __future__ import annotations

import dataclasses

import rich.table


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def rich(self) -> rich.table.Table:
        """The first column is of names, the others of figures."""
        made = rich.table.Table(title=self.title)
        for i, column in enumerate(self.columns):
            made.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            made.add_row(*row)
        return made

    def markdown(self) -> str:
        """Without the title, which a page has as a heading or sentence of its own."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
