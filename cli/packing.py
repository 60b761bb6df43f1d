"""`shoal pack`: a model laid out for being read from disk while it runs.

Knows options, the bar and what is printed. Building and verifying are `daemon.library.packs`.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import Library
from shoal.daemon.model_name import WHOLE, Quant, Reference, ShardName
from shoal.partition.amounts import format_bytes, format_duration

from .interrupt import deferred_interrupt
from .options import examples, json_option, quant_option, shard_name, size
from .terminal.output import note, print_json, spinner, transfer_bar
from .terminal.paint import printable

if TYPE_CHECKING:
    from shoal.daemon.library.packs import Estimate, Packs


@click.command(
    epilog=examples(
        "shoal pack smollm2",
        "shoal pack --quant q4 ~/models/llama-70b",
        "shoal pack --shard 2/3 ~/models/llama-70b",
        "shoal pack --verify smollm2",
    )
)
@click.argument("model")
@quant_option
@click.option(
    "--shard",
    type=shard_name,
    metavar="R/N",
    default=str(WHOLE),
    help="Only the part of every block that the R-th of N machines holds; the default, 1/1, is all.",
)
@click.option("--memory", type=size, metavar="SIZE", help="Memory this process may use, e.g. 500MB.")
@click.option("--verify", is_flag=True, help="Check an existing pack against its checksums.")
@json_option
def pack(model: str, shard: ShardName, memory: int | None, verify: bool, as_json: bool) -> None:
    """Pack MODEL: write its weights in the layout they are computed in, to be read from disk block by block.

    It first says how much disk and time this takes, and refuses if the disk is too full. After an interruption the same
    command continues where it stopped. shoal ls lists packs, shoal rm --packs removes them.
    """
    home = Home.from_env()
    wanted, quant = Reference.parse(model)
    path = Library(home).resolve(wanted)
    with spinner("starting"), deferred_interrupt():
        from shoal.daemon.library.packs import Packs
    if verify:
        _verify(Packs(home), wanted, path, quant, shard, as_json)
        return
    estimates: list[Estimate] = []

    def begins(estimate: Estimate) -> None:
        estimates.append(estimate)
        note(estimate.describe())

    began_s = time.monotonic()
    with transfer_bar() as bar:
        packs, progress = Packs(home, begins), partial(bar, "packing")
        made = packs.pack(path, quant, shard=shard, memory_bytes=memory, progress=progress)
    took_s = time.monotonic() - began_s
    directory, nbytes = made.path.parent, made.manifest.nbytes
    if as_json:
        built = {"built": bool(estimates), "seconds": round(took_s, 3) if estimates else 0.0}
        which = {"model": wanted, "quant": quant, "shard": str(made.manifest.shard)}
        print_json({**which, "bytes": nbytes, "path": str(directory), **built})
        return
    state = f"is packed in {format_duration(took_s)}" if estimates else "was packed already"
    note(f"{_part(shard)}{printable(model)} {state}: {format_bytes(nbytes)} in {directory}")


def _part(shard: ShardName) -> str:
    return "" if shard == WHOLE else f"shard {shard} of "


def _verify(packs: Packs, model: str, path: Path, quant: Quant, shard: ShardName, as_json: bool) -> None:
    directory = packs.directory(path, quant, shard)
    if not directory.is_dir():
        option = "" if shard == WHOLE else f"--shard {shard} "
        name = Reference(model, quant)
        hint = f"pack it with: shoal pack {option}{name}"
        raise DaemonError("not_found", f"{_part(shard)}{name} is not packed yet", hint)
    with transfer_bar() as bar:
        damaged = packs.verify(directory, partial(bar, "verifying"))
    if as_json:
        part = "whole" if shard == WHOLE else str(shard)
        print_json({"path": str(directory), "quant": quant, "shard": part, "damaged": damaged})
    if damaged:
        blocks = ", ".join(damaged[:3]) + (f" and {len(damaged) - 3} more" if len(damaged) > 3 else "")
        raise DaemonError(
            "corrupt",
            f"{directory}: altered since it was written: {blocks}",
            "shoal rm --packs removes it, shoal pack makes it anew",
        )
    if not as_json:
        note(f"{directory}: every block is as it was written")
