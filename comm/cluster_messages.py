"""Messages about the cluster: who is in it, who may join. Only the daemon's own user may send them.

Part of protocol `shoal/1`; `messages` has the others.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from .message import Message, Name, NonNegative

NodeRole = Literal["alone", "head", "worker"]


class Invite(Message):
    """Let one more machine join: from now on this daemon is a head. `listen`: addresses to listen on for machines,
    HOST:PORT; those used before if empty."""

    listen: Annotated[list[Name], Meta(max_length=16)] = []


class Invitation(Message):
    """`code` admits one machine, for `seconds`. It reaches this head at `addresses`."""

    code: str
    addresses: list[str]
    seconds: float
    announced: bool = False  # whether it says on the local network where it is


class Nodes(Message):
    """Who is in the cluster?"""


class NodeStatus(Message):
    """One machine. What is measured is 0 while it is not known, and for a machine that is away."""

    name: str
    fingerprint: str
    role: NodeRole
    attached: bool
    address: str = ""  # in use
    version: str = ""
    kernels: str = ""
    threads: NonNegative = 0
    memory_bytes: NonNegative = 0  # that it has for shards
    free_bytes: NonNegative = 0
    resident_bytes: NonNegative = 0
    rtt_s: float = 0.0
    bytes_per_s: float = 0.0
    routes: NonNegative = 0  # how many addresses were measured; the one in use was the best
    silent_s: float = 0.0  # since something was heard from it
    steps: NonNegative = 0  # that it has computed for the present group
    models: list[str] = []  # in which it takes part
    shares: list[float] = []  # of these models' weights
    trouble: str = ""  # why it is away


class NodesReply(Message):
    role: NodeRole
    nodes: list[NodeStatus]  # this machine first
    listening: list[str] = []


class Forget(Message):
    """Forget a machine, by its name or the beginning of its fingerprint: it can attach no more."""

    node: Name


class Rejoin(Message):
    """Read anew with whom this machine is paired, because `shoal cluster join` or `leave` has changed that."""
