"""How a link between two machines is described."""

from __future__ import annotations

from shoal.comm.cluster_messages import NodeStatus
from shoal.partition.amounts import format_bytes


def link_text(node: NodeStatus) -> str:
    """Why the address in use was chosen: "0.2 ms, 117 MB/s, best of 3"; "" while nothing was measured."""
    if not node.bytes_per_s:
        return ""
    best = f", best of {node.routes}" if node.routes > 1 else ""
    return f"{1000 * node.rtt_s:.2g} ms, {format_bytes(int(node.bytes_per_s))}/s{best}"
