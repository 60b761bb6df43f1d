"""`shoal show`: what a model is, and how it would run here.

Knows how facts and the plan are shown: bars before words. They come from `description` and `outlook` in `daemon`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from shoal.comm.home import Home
from shoal.daemon.library.library import Library
from shoal.daemon.model_name import Reference
from shoal.partition.amounts import counted, format_bytes

from .interrupt import deferred_interrupt
from .options import PlanOptions, examples, json_option, plan_options, quant_option
from .store import described_pack
from .terminal.output import console, facts, print_json, spinner
from .terminal.paint import printable
from .wording import worded

if TYPE_CHECKING:
    from rich.table import Table

    from shoal.daemon.loading.outlook import Outlook, TooLarge

BAR_COLUMNS = 40


@click.command(
    epilog=examples(
        "shoal show smollm2",
        "shoal show --memory 3GB ./model.gguf",
        "shoal show --quant q4 --memory 8GB ~/models/llama-70b",
        "shoal show --json ./model.gguf",
    )
)
@click.argument("model")
@quant_option
@json_option
@plan_options
def show(model: str, as_json: bool, plan: PlanOptions) -> None:
    """Show what MODEL, a path or a name in the store, is and how it would run: what stays in memory, what is streamed
    from disk, how long a token takes.

    Nothing is loaded or packed; the speed of the disk is measured.
    """
    wanted = Reference.parse(model)
    config = plan.config(quant=wanted.quant)
    home = Home.from_env()
    path = Library(home).resolve(wanted.model)
    with spinner("looking"):
        with deferred_interrupt():
            from shoal.daemon.library.packs import Packs
            from shoal.daemon.loading.checkpoint_facts import checkpoint_facts
            from shoal.daemon.loading.outlook import TooLarge, outlook
            from shoal.daemon.throughput.own_machine import OwnMachine
        packs = Packs(home)
        # Before anything is read: what this process takes then is what the daemon takes before it has a model.
        found = outlook(path, config, packs, OwnMachine.of(home, config.thread_count))
        described = checkpoint_facts(path)
        made = packs.shelf.of(packs.shelf.model_of(path))
    if as_json:
        plan_facts = {"fits": not isinstance(found, TooLarge), **msgspec.structs.asdict(found)}
        print_json({**described, "plan": plan_facts, "packs": [described_pack(pack) for pack in made]})
        return
    rows = facts()
    for name, value in described.items():
        rows.add_row(name.replace("_", " "), printable(_human(name, value)))
    for pack in made:
        if pack.shard not in ("whole", ""):
            about = f"{pack.quant}, {format_bytes(pack.size_bytes)}, {pack.state}"
            rows.add_row(f"shard {pack.shard}", about)
    screen = console()
    screen.print(rows)
    screen.print()
    if isinstance(found, TooLarge):
        screen.print(_misfit(found))
        return
    screen.print(_memory(found))
    screen.print()
    screen.print(_words(found))


def _memory(found: Outlook) -> Table:
    """Who takes how much of the budget, one bar beginning where the one before ends."""
    from rich.bar import Bar

    rows = facts()
    rows.add_column(justify="right")
    rows.add_column()
    uses, begin = found.memory_bytes, 0
    for name, nbytes, colour in (
        ("weights", uses.weights, "green"),
        ("window", uses.window, "cyan"),
        ("KV", uses.kv, "blue"),
        ("scratch", uses.scratch, "magenta"),
        ("process", uses.process, "yellow"),
        ("free", uses.free, "bright_black"),
    ):
        if nbytes > 0:
            bar = Bar(found.budget_bytes, begin, begin + nbytes, width=BAR_COLUMNS, color=colour)
            rows.add_row(name, "", format_bytes(nbytes), bar)
            begin += nbytes
    rows.add_row("memory", "", format_bytes(found.budget_bytes), "")
    return rows


def _words(found: Outlook) -> Table:
    rows = facts()
    whole = format_bytes(found.weights_bytes)
    if found.device or not found.streamed_bytes:
        rows.add_row("weights", found.placed or f"all {whole} stay in memory")
    else:
        stay = format_bytes(found.memory_bytes.weights)
        rows.add_row("weights", f"{stay} of {whole} stay in memory, the rest is streamed from disk")
    if found.streamed_bytes:
        speed = f"{format_bytes(found.read_bytes_per_s)}/s, the disk's speed just now"
        read = f"{format_bytes(found.streamed_bytes)} for each token"
        takes = f", {found.step_s:.2g} s" if found.step_s else ""
        rows.add_row("reading", f"{read}{takes} at {speed}")
    if found.device:
        rows.add_row(found.device, f"{format_bytes(found.device_bytes)} of its memory, with scratch")
    unknown = f"not predicted: nothing is known of how fast {found.device} is"
    rows.add_row("speed", _speed(found) if found.tokens_per_s else unknown)
    if found.why:
        rows.add_row("devices", found.why)
    if found.trouble:
        rows.add_row("trouble", found.trouble)
    if found.pack_bytes:
        there = "made already" if found.packed else "to be made by the first run, or by shoal pack"
        rows.add_row("pack", f"{format_bytes(found.pack_bytes)} on disk, {there}")
    rows.add_row("context", f"{found.context_tokens:,} tokens; KV for {found.kv_tokens:,} in {found.kv_type}")
    return rows


def _speed(found: Outlook) -> str:
    low, high = found.band
    guessed = "" if found.measured else "; shoal profile would make that better than a guess"
    return (
        f"about {found.tokens_per_s:.3g} tokens/s ({low:.3g} to {high:.3g}), bound by {found.binding}, the first "
        f"after {found.first_s:.2g} s with a prompt of {counted(found.prompt_tokens, 'token')}{guessed}"
    )


def _misfit(found: TooLarge) -> Table:
    rows = facts()
    rows.add_row("memory", found.refused)
    rows.add_row("", worded(found.remedy))
    return rows


def _human(name: str, value: Any) -> str:
    if value is None:
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(value) or "none"
    if name == "bytes":
        return format_bytes(value)
    if name == "parameters":
        return f"{value / 1e6:,.1f} M" if value < 1e9 else f"{value / 1e9:,.2f} B"
    if isinstance(value, dict):
        return ", ".join(f"{kind} × {count}" for kind, count in value.items())
    return str(value)
