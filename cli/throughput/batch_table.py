"""What `shoal plan --requests` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.cli.terminal.output import console, note, print_json, table
from shoal.cli.terminal.paint import printable

from .figures import peak_words, rate_words, seconds_words

if TYPE_CHECKING:
    from shoal.daemon.throughput.batch_foresight import BatchForesight


def show_batch(found: BatchForesight, machine: str, *, as_json: bool) -> None:
    if isinstance(found.trouble, str):
        note(found.trouble)
    if as_json:
        print_json(found)
        return
    screen = console()
    if found.plans:
        right = "at once", "all take", "requests/s", "tokens/s", "peak"
        rows = table("plan", "fits", *right, "binds", right=right)
        for row in found.plans:
            rows.add_row(
                ("→ " if row.name == found.chosen else "  ") + row.name,
                "yes" if row.fits else f"no, {row.missing} missing",
                "" if row.at_once is None else f"{row.at_once:,}",
                "" if row.seconds is None else seconds_words(row.seconds),
                "" if row.requests_per_s is None else rate_words(row.requests_per_s),
                "" if row.tokens_per_s is None else rate_words(row.tokens_per_s),
                peak_words(row.peak_bytes, [machine]),
                row.binding,
            )
        screen.print(rows)
        screen.print()
    screen.print(printable(f"{found.chosen}: {found.reason}" if found.chosen else found.reason))
    for bound in found.bounds:
        screen.print(
            printable(
                f"through {bound.device}: no schedule gives more than {rate_words(bound.tokens_per_s)} tokens/s; from "
                f"{bound.saturating_tokens:,.0f} tokens in a step on it would compute longer than weights take to come"
            )
        )
