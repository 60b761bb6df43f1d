"""Plans as a table: those that are worth a look, or all. For one job, and for many requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.text import Text

from shoal.cli.terminal.output import table
from shoal.partition.amounts import format_bytes, format_rate, rounded_up

from .figures import seconds_words

if TYPE_CHECKING:
    from shoal.daemon.throughput.batch_foresight import BatchRow
    from shoal.daemon.throughput.foresight import PlanRow

    Row = TypeVar("Row", PlanRow, BatchRow)

_CHOSEN, _LACKS = "→", "✗"
_INDENT = 4


class _Named:
    """A mark and a name. It is broken at commas if that will do; further lines begin further right than names do."""

    def __init__(self, mark: str, name: str) -> None:
        self._mark, self._name = mark or " ", name

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        *parts, last = self._name.split(", ")
        lines: list[str] = []
        for part in [*(f"{part}," for part in parts), last]:
            longer = f"{lines[-1]} {part}" if lines else part
            if cell_len(longer) <= options.max_width - (_INDENT if len(lines) > 1 else 2):
                lines[-1:] = [longer]
            else:
                lines += [it.plain for it in Text(part).wrap(console, options.max_width - _INDENT)]
        yield Text(f"{self._mark} {lines[0]}")
        for line in lines[1:]:
            yield Text(" " * _INDENT + line)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        words = Measurement.get(console, options, self._name)
        return Measurement(words.minimum + _INDENT, max(words.minimum + _INDENT, words.maximum + 2))


class _Column(NamedTuple):
    name: str
    cells: Sequence[str]
    right: bool = True


def plans_table(
    plans: Sequence[PlanRow],
    best: Collection[str],
    chosen: str | None,
    machines: Collection[str],
    *,
    all_: bool,
) -> Group:
    """Of one job. `best`: the names of those that are shown, the best first, unless `all_` are. `machines`: whose peaks
    are of memory, others are devices."""
    rows = _shown(plans, best, all_=all_)
    columns = [
        _Column("first token", [seconds_words(row.ttft_s) for row in rows]),
        _Column("tokens/s", [format_rate(row.tokens_per_s) for row in rows]),
        _Column("±", [f"{row.band[1] / row.tokens_per_s - 1:.0%}" for row in rows]),
    ]
    return _drawn(plans, rows, columns, chosen, machines)


def batches_table(
    plans: Sequence[BatchRow],
    best: Collection[str],
    chosen: str | None,
    machines: Collection[str],
    *,
    all_: bool,
) -> Group:
    """Of many requests; the rest as above."""
    rows = _shown(plans, best, all_=all_)
    columns = [
        _Column("at once", [_known(row.at_once, "{:,}".format) for row in rows]),
        _Column("all take", [_known(row.seconds, seconds_words) for row in rows]),
        _Column("tokens/s", [_known(row.tokens_per_s, format_rate) for row in rows]),
    ]
    return _drawn(plans, rows, columns, chosen, machines)


def _known(value: float | None, words: Callable[[float], str]) -> str:
    return "" if value is None else words(value)


def _shown(plans: Sequence[Row], best: Collection[str], *, all_: bool) -> Sequence[Row]:
    by_name = {row.name: row for row in plans}
    return plans if all_ else [by_name[name] for name in best]


def _drawn(
    plans: Sequence[Row],
    rows: Sequence[Row],
    its: Iterable[_Column],
    chosen: str | None,
    machines: Collection[str],
) -> Group:
    """With what both kinds have, and what is to be said below."""
    lacking: int = sum(not row.fits for row in rows)
    devices: dict[str, None] = dict.fromkeys(
        name for row in rows for name in row.peak_bytes if name not in machines
    )
    columns = [
        *([_Column("needs", [_needs(row) for row in rows])] if lacking else []),
        *its,
        _Column("peak", [_peak(row, machines) for row in rows]),
        *(_Column(f"of {name}", [_peak(row, (name,)) for row in rows]) for name in devices),
        _Column("binds", [row.binding for row in rows], right=False),
    ]
    made = table("  plan", *(it.name for it in columns), right=tuple(it.name for it in columns if it.right))
    made.padding = (0, 0, 0, 1)
    for column in made.columns[1:]:
        column.no_wrap = True
    for number, row in enumerate(rows):
        mark = _CHOSEN if row.name == chosen else "" if row.fits else _LACKS
        made.add_row(_Named(mark, row.name), *(it.cells[number] for it in columns))
    said = [Text(line) for line in _below(plans, rows, lacking)]
    return Group(made, *said)


def _needs(row: PlanRow | BatchRow) -> str:
    if row.fits:
        return ""
    return format_bytes(rounded_up(row.needs_bytes)) if row.needs_bytes else row.missing or ""


def _peak(row: PlanRow | BatchRow, names: Collection[str]) -> str:
    """The largest of these machines'."""
    its = [nbytes for name, nbytes in row.peak_bytes.items() if name in names]
    return format_bytes(max(its)) if its else ""


def _below(plans: Sequence[Row], rows: Sequence[Row], lacking: int) -> Iterable[str]:
    if lacking:
        yield f"{_LACKS} does not fit (a plan needs room for any request, a peak is of this job alone)"
    if hidden := len(plans) - len(rows):
        lack = sum(not row.fits for row in plans) - lacking
        said = "does not fit" if lack == 1 else "do not fit"
        which = f" that {said}" if lack == hidden else f" ({lack} {said})" if lack else ""
        yield f"  and {hidden} more{which}: --all"
