"""How the machines of a cluster are shown: a row for each, what they lend and what they do."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.comm.cluster_messages import NodesReply, NodeStatus
from shoal.partition.amounts import format_bytes, format_delay

from .link_text import link_text
from .output import console, note, table


def show_nodes(found: NodesReply) -> None:
    """The table and where machines attach on stdout; beside it, why some are not attached."""
    screen = console()
    waited, computing = any(node.wait_s for node in found.nodes), any(node.models for node in found.nodes)
    numbers = ("threads", "memory free") + ("waited for",) * waited
    columns = ("machine", "role", "state", "address", "link", *numbers) + ("computes",) * computing
    rows = table(*columns, right=numbers)
    for copied in (columns.index("machine"), columns.index("address")):
        rows.columns[copied].no_wrap = True
    for number, node in enumerate(found.nodes):
        name = node.name + (" (this)" if number == 0 else "")
        known = node.threads > 0
        cells = [
            name,
            node.role,
            _state(node, found.nodes[0]),
            node.address,
            link_text(node),
            str(node.threads) if known else "",
            f"{format_bytes(node.free_bytes)} of {format_bytes(node.memory_bytes)}" if known else "",
        ]
        if waited:
            cells.append(format_delay(node.wait_s) if node.wait_s else "")
        if computing:
            cells.append(", ".join(_computes(node)))
        rows.add_row(*cells)
    screen.print(rows)
    if found.listening:
        screen.print(f"other machines attach at {', '.join(found.listening)}")
    if found.closed:
        why = "all machines are there" if len(found.nodes) > 1 else "there is no machine to wait for"
        screen.print(f"closed, as {why}: {', '.join(found.closed)}")
    for node in found.nodes:
        if node.trouble:
            note(f"{node.name} is not attached: {node.trouble}")
        elif node.preparing:
            note(f"{node.name} tests its kernels and measures itself before it first attaches")


def _state(node: NodeStatus, this: NodeStatus) -> str:
    if not node.attached:
        unasked = node.role == "head" and this.preparing  # it is dialled when this machine is prepared
        return "preparing" if node.preparing else "not asked yet" if unasked else "away"
    return "attached" if node.silent_s < 2 else f"silent for {node.silent_s:.0f} s"


def _computes(node: NodeStatus) -> Iterator[str]:
    shares = [*node.shares, *[0.0] * len(node.models)]
    for model, share in zip(node.models, shares, strict=False):
        yield f"{100 * share:.0f}% of {model}" if share else model
