"""How links of a cluster are shown: a row for each worker, and what they mean together."""

from __future__ import annotations

from shoal.comm.cluster_messages import LinksReply
from shoal.partition.amounts import format_bytes, format_delay

from .output import console, note, table


def show_links(found: LinksReply) -> None:
    """The table on stdout, and below it who is waited for."""
    screen = console()
    several = len(found.links) > 1
    waited = any(link.waits for link in found.links)
    numbers: tuple[str, ...] = ("there and back", "1 of 100", "to it", "from it")
    numbers += ("all at once",) * several + ("waited for",) * waited
    rows = table("machine", "address", *numbers, "verdict", right=numbers)
    for link in found.links:
        known = link.rtt_s > 0
        cells = [
            format_delay(link.rtt_s) if known else "",
            format_delay(link.rtt_p99_s) if known else "",
            _speed(link.to_bytes_per_s),
            _speed(link.from_bytes_per_s),
        ]
        if several:
            cells.append(_speed(link.incast_bytes_per_s))
        if waited:
            cells.append(format_delay(link.wait_s) if link.waits else "")
        rows.add_row(
            link.name, link.address, *cells, f"{link.verdict}: {link.why}" if link.why else link.verdict
        )
    if found.links:
        screen.print(rows)
    if found.incast_bytes_per_s:
        screen.print(f"all workers at once: {_speed(found.incast_bytes_per_s)} into this machine")
    screen.print(found.why)
    if found.computing:
        note(f"{', '.join(found.computing)} computed meanwhile, so links may be better than they look here")


def _speed(bytes_per_s: float) -> str:
    return f"{format_bytes(bytes_per_s)}/s" if bytes_per_s else ""
