"""Tables that are printed on a terminal and written as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.table


@dataclass
class Table:
    """Rows of text under named columns, the first of them left-aligned.

    Attributes:
        title: Its heading.
        columns: Their names.
        rows: The cells of each row.
    """

    title: str
    columns: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Add a row, with one cell per column."""
        assert len(cells) == len(self.columns)
        self.rows.append(cells)

    def rich(self) -> rich.table.Table:
        """The table for a terminal."""
        table = rich.table.Table(title=self.title)
        for index, name in enumerate(self.columns):
            table.add_column(name, justify="right" if index else "left", no_wrap=not index)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table for a page."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)
