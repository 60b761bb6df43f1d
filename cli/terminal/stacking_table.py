"""A table that a narrow terminal can show, too."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 10_000


class StackingTable(Table):
    """Where words or numbers would have to be broken to fit, the cells of a row come below each other, the first as a
    heading."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = Measurement.get(console, options.update(width=_WIDEST), self).minimum
        if needed <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        headers = [it.header for it in self.columns]
        for first, *others in zip(*(it.cells for it in self.columns), strict=True):
            yield first
            row = Table.grid(padding=(0, 1))
            row.add_column(style="dim", no_wrap=True)
            row.add_column(overflow="fold")
            for header, cell in zip(headers[1:], others, strict=True):
                if cell != "":
                    row.add_row("    " + str(header), cell)
            yield row
