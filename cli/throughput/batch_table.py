"""What `shoal plan --requests` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.cli.terminal.output import console, note, print_json
from shoal.cli.terminal.paint import printable
from shoal.partition.amounts import format_rate

from .plan_table import batches_table

if TYPE_CHECKING:
    from shoal.daemon.throughput.batch_foresight import BatchForesight


def show_batch(found: BatchForesight, machine: str, *, as_json: bool, all_: bool) -> None:
    if isinstance(found.trouble, str):
        note(found.trouble)
    if as_json:
        print_json(found)
        return
    screen = console()
    if found.plans:
        screen.print(batches_table(found.plans, found.best, found.chosen, {machine}, all_=all_))
        screen.print()
    screen.print(printable(f"{found.chosen}: {found.reason}" if found.chosen else found.reason))
    for bound in found.bounds:
        screen.print(
            printable(
                f"through {bound.device}: no schedule gives more than {format_rate(bound.tokens_per_s)} tokens/s, and "
                f"one without gaps {format_rate(bound.expected_tokens_per_s)} with so many requests; from "
                f"{bound.saturating_tokens:,.0f} tokens in a step on it would compute longer than weights take to come"
            )
        )
