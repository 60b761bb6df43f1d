"""Messages about the cluster: who is in it, who may join. Only the daemon's own user may send them.

Part of protocol `shoal/1`; `messages` has the others.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from .message import Message, Name, NonNegative

NodeRole = Literal["alone", "head", "worker"]

LinkVerdict = Literal["good", "far", "thin", "unsteady", "computes slowly", "lost"]
"""What holds others up: the delay, the bytes per second, single long delays, or the time that it computes."""


class Invite(Message):
    """Let one more machine join: from now on this daemon is a head. `listen`: addresses to listen on for machines,
    HOST:PORT; those used before if empty. The host `auto` is every real address while a machine may come, and those in
    use when all are there."""

    listen: Annotated[list[Name], Meta(max_length=16)] = []


class Invitation(Message):
    """`code` admits one machine, for `seconds`. It reaches this head at `addresses`."""

    code: str
    addresses: list[str]
    seconds: float
    announced: bool = False  # whether it says on the local network where it is
    caveat: str = ""  # one sentence if these addresses are of no use to machines of the network


class Nodes(Message):
    """Who is in the cluster?"""


class NodeStatus(Message):
    """One machine. What is measured is 0 while it is not known, and for a machine that is away."""

    name: str
    fingerprint: str
    role: NodeRole
    attached: bool
    preparing: bool = False  # not yet, as it tests its kernels and measures itself first
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
    wait_s: float = 0.0  # how long the head has waited for its part of a sum, the median of the latest
    longest_wait_s: float = 0.0  # of these
    memory_bytes_per_s: float = 0.0  # at which it reads weights for one token
    flops: float = 0.0  # of its long steps
    disk_bytes_per_s: float = 0.0


class PairStatus(Message):
    """The link between two workers, by their fingerprints."""

    between: list[str]
    rtt_s: float
    bytes_per_s: float


class NodesReply(Message):
    role: NodeRole
    nodes: list[NodeStatus]  # this machine first
    listening: list[str] = []  # where this head listens for other machines now
    closed: list[str] = []  # where it would if one could come that is not there
    pairs: list[PairStatus] = []  # of workers that are attached and reach each other


class MeasureLinks(Message):
    """Measure the links to all workers that are attached; takes a second or two for each.
    Computing goes on meanwhile."""


class LinkStatus(Message):
    """What was measured of one worker's link. 0 = it could not be."""

    name: str
    address: str = ""
    trips: NonNegative = 0  # small messages there and back
    rtt_s: float = 0.0  # their median
    rtt_p99_s: float = 0.0
    to_bytes_per_s: float = 0.0  # from the head to it
    from_bytes_per_s: float = 0.0
    incast_bytes_per_s: float = 0.0  # from it, while all others send to the head, too
    waits: NonNegative = 0  # parts of sums that the head waited for lately, while a model computed
    wait_s: float = 0.0  # for how long: the median
    longest_wait_s: float = 0.0
    part_bytes: NonNegative = 0  # of such a part
    verdict: LinkVerdict = "good"
    why: str = ""  # if it is not good


class LinksReply(Message):
    links: list[LinkStatus]
    incast_bytes_per_s: float = 0.0  # of all workers together; 0 with fewer than two
    culprit: str = ""  # the name of the worker that others wait for, if one stands out
    why: str = ""  # or why there is none
    computing: list[str] = []  # models that computed meanwhile, which makes links look slower
    seconds: float = 0.0  # that measuring took


class Forget(Message):
    """Forget a machine, by its name or its fingerprint: it can attach no more. A worker that forgets its
    head leaves it, and tells it so."""

    node: Name


class Rejoin(Message):
    """Read anew with whom this machine is paired, because `shoal cluster join` or `leave` has changed that."""
