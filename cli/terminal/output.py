"""What the verbs print: notes and progress on stderr, results on stdout.

Knows terminals and colours (NO_COLOR holds). rich is imported when something is drawn. Answers: `paint`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import click
import msgspec

from shoal.cli.interrupt import unechoed
from shoal.partition.amounts import format_bytes, format_duration

from .paint import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn
    from rich.table import Table

    from shoal.comm.messages import Stage
    from shoal.daemon.progress import Progress


_ANSWERS = ("", "y", "yes", "n", "no")
WIDE_COLUMNS = 120  # in which a bar has a name and its full length
PIPE_COLUMNS = 10_000  # through a pipe, a row of a table stays one line
_LISTED_NUMBERS = re.compile(r"(?<=\[)\n[-+.eE\d,\s]+(?=\])")  # no string has a line break unescaped


def note(text: str) -> None:
    """A line beside the result, on stderr. On a terminal it is broken between words, and dim."""
    text = printable(text)
    if sys.stderr.isatty():
        text = folded(text, shutil.get_terminal_size().columns)
        if not os.environ.get("NO_COLOR"):
            text = click.style(text, dim=True)
    click.echo(text, err=True)


def folded(text: str, columns: int) -> str:
    """Lines of at most `columns` characters, but for words that are longer."""
    fold = textwrap.TextWrapper(columns, break_long_words=False, break_on_hyphens=False)
    return "\n".join("\n".join(fold.wrap(line)) for line in text.split("\n"))


def confirmed(question: str, *, default: bool) -> bool:
    """The answer to a question at the terminal, asked on stderr until it is one; Enter is the default. Raises
    click.Abort."""
    choice = "Y/n" if default else "y/N"
    while True:
        answer = click.prompt(f"{question} [{choice}]", "", show_default=False, prompt_suffix=" ", err=True)
        if (said := answer.strip().lower()) in _ANSWERS:
            return default if said == "" else said[0] == "y"
        note("answer y or n")


def print_json(value: Any) -> None:
    """A struct, dataclass, dict or list as JSON on stdout, lists of numbers in one line each."""
    text = msgspec.json.format(msgspec.json.encode(value)).decode()
    click.echo(_LISTED_NUMBERS.sub(lambda found: " ".join(found[0].split()), text))


def console(*, stderr: bool = False, markup: bool = False) -> Console:
    """Where tables and bars are drawn. markup: whether [brackets] in texts are styles, for our own texts only."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, markup=markup, emoji=False)
    if made.is_terminal:
        return made
    from .piped_console import PipedConsole

    return PipedConsole(stderr=stderr, highlight=False, markup=markup, emoji=False, width=PIPE_COLUMNS)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table without lines; columns named in `right` are aligned to the right."""
    from rich import box

    from .stacking_table import StackingTable

    made = StackingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def facts() -> Table:
    """An empty two-column table of names and values."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    return made


def per_second(count: float, what: str = "") -> str:
    """'35.2/s', '1,260/s', '35.2 tokens/s'."""
    return (f"{count:,.0f}" if count >= 100 else f"{count:.3g}") + (f" {what}/s" if what else "/s")


def stage_text(stage: Stage) -> str:
    """What an answer waits for: 'reading 41/80 blocks, 1.9 GB/s', 'packing 0.5 GB of 1.1 GB, 0.4 GB/s, 2 s left',
    'reading the prompt, 1,024 of 4,100 tokens, 35/s, 1 min 27 s left'."""
    done, total, left = stage.done, stage.total, stage.total - stage.done
    bytes_speed = f", {format_bytes(int(stage.bytes_per_s))}/s" if stage.bytes_per_s else ""
    match stage.doing:
        case "queued":
            return f"waiting for its turn, place {done} of {total} in the queue"
        case "prompt":
            speed = stage.tokens_per_s
            ends = f", {per_second(speed)}, {format_duration(left / speed)} left" if speed else ""
            return f"reading the prompt, {done:,} of {total:,} tokens{ends}{bytes_speed}"
        case "reading":
            return f"reading {done}/{total} blocks{bytes_speed}"
        case "regrouping":
            return "the machines that compute it have changed: it is loaded again"
    ends = f", {format_duration(left / stage.bytes_per_s)} left" if stage.bytes_per_s else ""
    return f"{stage.doing} {format_bytes(done)} of {format_bytes(total)}{bytes_speed}{ends}"


@contextmanager
def spinner(what: str) -> Iterator[Callable[[str], None]]:
    """A moving line on stderr while something takes long; yields a function that changes its text."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda text: None
        return
    with unechoed(), screen.status(what, spinner="dots") as status:
        yield status.update


def transfer_bar() -> AbstractContextManager[Progress]:
    """A progress bar for bytes, with speed and time left; on stderr, gone when done."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return _bar(DownloadColumn(), TransferSpeedColumn())


def steps_bar() -> AbstractContextManager[Progress]:
    """A progress bar for counted steps."""
    from rich.progress import MofNCompleteColumn

    return _bar(MofNCompleteColumn())


@contextmanager
def _bar(*amounts: ProgressColumn) -> Iterator[Progress]:
    """`amounts` stand between the bar and the time that is left."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    screen = console(stderr=True)
    bars = Bars(*columns, console=screen, transient=True, disable=not screen.is_terminal)
    with unechoed() if screen.is_terminal else nullcontext(), bars:
        shown: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in shown:
                for task in shown.values():
                    bars.update(task, visible=False)
                shown[what] = bars.add_task(what, total=total or None)
            bars.update(shown[what], completed=done, total=total or None)

        yield update


@contextmanager
def counts_bar(
    what: str, total: int, *, quiet: bool = False
) -> Iterator[Callable[[int, Sequence[str]], None]]:
    """A progress bar on stderr; yields what sets how many are done, and what is said beside it, the most useful first.
    Of that the terminal shows as much as fits into one line."""
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    screen = console(stderr=True)
    wide = screen.width >= WIDE_COLUMNS
    bar_columns = 40 if wide else 10
    columns = (
        *([TextColumn("{task.description}")] if wide else []),
        BarColumn(bar_columns),
        TextColumn("{task.fields[beside]}"),
    )
    with Bars(*columns, console=screen, transient=True, disable=quiet or not screen.is_terminal) as bars:
        task = bars.add_task(what, total=total, beside=f"0/{total:,}")

        def update(done: int, beside: Sequence[str]) -> None:
            room = screen.width - bar_columns - 1 - (len(what) + 1 if wide else 0)
            text = f"{done:,}/{total:,}"
            for more, part in enumerate(beside):
                longer = f"{text}{', ' if more else ' '}{part}"
                if len(longer) > room:
                    break
                text = longer
            bars.update(task, completed=done, beside=text)

        yield update
