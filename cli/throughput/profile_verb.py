"""`shoal profile`: what this machine can do, measured; or what a file says of one.

Knows options and how a profile is shown. `daemon.throughput` measures.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.cli.interrupt import deferred_interrupt
from shoal.cli.options import InputFile, Whole, examples, json_option
from shoal.cli.terminal.output import console, facts, note, spinner, table
from shoal.cli.terminal.paint import printable
from shoal.comm.home import Home
from shoal.partition.amounts import counted

from .own_machines import own_machines

if TYPE_CHECKING:
    from rich.table import Table


@click.command(
    epilog=examples(
        "shoal profile",
        "shoal profile --out laptop.json",
        "shoal profile --json --threads 2",
        "shoal profile --tables",
        "shoal profile --device cuda:0 --out workstation.json",
        "shoal profile --profile laptop.json",
    )
)
@click.option("--threads", type=Whole(min=1), metavar="N", help="CPU threads (default: all).")
@click.option(
    "--device",
    "named",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Of a device, too: cuda:0, sim:1GB, cpu for none; auto: the first card.",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write it to a file, too."
)
@click.option("--anew", is_flag=True, help="Measure again, though nothing has changed since the last time.")
@click.option(
    "--profile",
    "given",
    type=InputFile(),
    metavar="FILE",
    help="Check and show this profile instead of measuring.",
)
@click.option("--tables", is_flag=True, help="Show what kernels take, too, by stored type, size and rows.")
@json_option
def profile(
    threads: int | None,
    named: str,
    out: Path | None,
    anew: bool,
    given: Path | None,
    tables: bool,
    as_json: bool,
) -> None:
    """Measure what this machine can do: memory, kernels by stored type and rows, attention, the disk, fixed costs.

    Takes less than a minute in which nothing else should run, and is kept until hardware, threads, disk or Shoal
    change.
    shoal plan predicts from it, here or on another machine that is given the file. If machines are attached to the
    daemon here, they and the links to them are measured, too, and are in the file. So is a device, with matrices as
    many models have them.
    """
    with spinner("starting"), deferred_interrupt():
        from shoal.daemon.config import NodeConfig
        from shoal.daemon.loading.device_rooms import device_laws
        from shoal.daemon.throughput.own_machine import OwnMachine
        from shoal.daemon.throughput.profile_files import profile_text, read_profile
        from shoal.daemon.throughput.profile_words import (
            attention_table,
            device_facts,
            link_facts,
            rows_table,
        )
        from shoal.daemon.throughput.profiling import others_compute
    if given is not None:
        found = read_profile(given)
    else:
        home, config = Home.from_env(), NodeConfig(threads=threads, device=named)
        count = config.thread_count
        disturbed = others_compute(count)
        found = own_machines(home, count, anew=anew, measure_links=True).profile
        with spinner("trying the device"):
            there, trouble = device_laws(config.device, OwnMachine.of(home, count))
        if trouble:
            note(trouble)
        elif config.names_device and not there:
            note(f"{config.device} is left out: too little of its memory is free to try how fast it is")
        if there:
            head = replace(found.head, accelerators=there)
            found = replace(found, devices=(head, *found.devices[1:]))
        if disturbed:
            note(
                "other programs compute: what is measured now is too slow, and is measured again when they do not"
            )
    text = profile_text(found)
    if out is not None:
        out.write_bytes(text + b"\n")
        note(f"written to {out}")
    if as_json:
        click.echo(text)
        return
    screen = console()
    for device in found.devices:
        rows = facts()
        for name, value in device_facts(device):
            rows.add_row(printable(name), printable(value))
        screen.print(rows)
        measured = [it for it in (rows_table(device), attention_table(device)) if it[1]]
        for columns, lines in measured if tables else ():
            screen.print()
            screen.print(_table(columns, lines))
        if measured and not tables:
            screen.print(
                f"and {counted(sum(len(lines) for _, lines in measured), 'row')} of what kernels take: --tables"
            )
    if found.links:
        rows = facts()
        for name, value in link_facts(found):
            rows.add_row(printable(name), printable(value))
        screen.print(rows)


def _table(columns: list[str], lines: list[list[str]]) -> Table:
    made = table(*columns, right=tuple(columns[2:]))
    for line in lines:
        made.add_row(*line)
    return made
