"""A table that a narrow terminal can show, too."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 10_000


class StackingTable(Table):
    """No word or number is broken, unless it is longer than a line: where they would have to be, the cells of a row
    come below each other, the first as a heading."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=_WIDEST)
        needs = []
        for column in self.columns:
            sizes = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
            most = max(it.maximum for it in sizes)
            needs.append((most if column.no_wrap else max(it.minimum for it in sizes), most))
        between = Measurement.get(console, wide, self).maximum - sum(most for _, most in needs)
        spare = options.max_width - between - sum(least for least, _ in needs)
        if spare < 0:
            yield from self._stacked()
            return
        # What needs little more than its longest word gets that first.
        for column, (least, most) in sorted(
            zip(self.columns, needs, strict=True), key=lambda it: it[1][1] - it[1][0]
        ):
            given = min(most - least, spare)
            column.width, spare = least + given, spare - given
        yield from super().__rich_console__(console, options)

    def _stacked(self) -> RenderResult:
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
