"""A table as data, for the terminal and for Markdown."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.console
    import rich.table

FILE_WIDTH = 160  # columns of tables that go to a file or a pipe


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def rich(self) -> rich.table.Table:
        """The first column is of names, the others of figures. Nothing in it is taken for markup."""
        import rich.table
        from rich.text import Text

        made = rich.table.Table(title=Text(self.title))
        for i, column in enumerate(self.columns):
            made.add_column(Text(column), justify="left" if i == 0 else "right")
        for row in self.rows:
            made.add_row(*map(Text, row))
        return made

    def markdown(self) -> str:
        """Without the title, which a page has as a heading or sentence of its own."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def show(self) -> None:
        """Prints it on the terminal; as Markdown where rich is not installed, as on a machine that only measures."""
        try:
            console().print(self.rich())
        except ImportError:
            print(f"{self.title}\n{self.markdown()}")


def console() -> rich.console.Console:
    """Where tables are printed: as wide as the terminal, or wide enough for all of ours. Paths are not markup."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False, markup=False)
