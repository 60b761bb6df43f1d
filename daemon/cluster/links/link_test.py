"""Measures the links of a head to its workers: delays, bytes per second each way, and all workers sending at once.

Probes go over the control channels, beside beats: none takes longer than a fraction of the time after which a silent
node is lost. One link at a time, so that none counts for another; then all together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median, quantiles
from typing import NamedTuple

from msgspec.structs import replace

from shoal.comm.cluster_messages import LinksReply, LinkStatus
from shoal.comm.errors import CommError
from shoal.comm.group.sums.part_waits import WaitSummary
from shoal.daemon.cluster.control_messages import PROBE_BYTES
from shoal.daemon.cluster.member import Member
from shoal.daemon.cluster.roster import Roster
from shoal.partition.machines import LinkSpeed

from .link_probes import Probes
from .verdicts import culprit, judged

TRIPS_AT_MOST = 200
TRIPS_S = 0.6
WAY_S = 0.4  # for all probes that go one way
FIRST_BYTES, LEAST_BYTES = 4 << 10, 1 << 10
PROBE_BURST_S = 0.2  # that many bytes may take at once, and while a model computes
COMPUTING_BURST_S = 0.03
INCASTS = 3

Computing = Callable[[], Sequence[str]]
"""The models that compute now."""


def measure_links(
    roster: Roster, computing: Computing, clock: Callable[[], float] = time.monotonic
) -> LinksReply:
    """All links, with verdicts. A member that is lost meanwhile has the verdict "lost". What is found while nothing
    computes counts from now on when machines are chosen."""
    began_s = clock()
    members = roster.members
    seen = list(computing())
    links: list[LinkStatus] = []
    for member in members:
        links.append(_measured(member, bool(seen), clock))
        seen += computing()
    total = 0.0
    if len(members) > 1:
        links, total = _with_incast(members, links, bool(seen))
        seen += computing()
    links = judged([_with_waits(link, roster, member) for link, member in zip(links, members, strict=True)])
    name, why = culprit(links)
    return LinksReply(
        links=links,
        incast_bytes_per_s=total,
        culprit=name,
        why="; ".join([why if links else "no worker is attached", *roster.absent]),
        computing=list(dict.fromkeys(seen)),
        seconds=clock() - began_s,
    )


def _measured(member: Member, computing: bool, clock: Callable[[], float]) -> LinkStatus:
    link = LinkStatus(name=member.name, address=member.address)
    burst_s = COMPUTING_BURST_S if computing else PROBE_BURST_S
    try:
        trips = _trips(member.probes, clock)
        rtt_s = median(trips)
        link = replace(link, trips=len(trips), rtt_s=rtt_s, rtt_p99_s=_percentile(trips))
        to = _speed(lambda n: member.probes.took_s(member.probes.begin(bytes(n))), min(trips), burst_s, clock)
        back = _speed(
            lambda n: member.probes.took_s(member.probes.begin(reply_bytes=n), n), min(trips), burst_s, clock
        )
        if not computing:  # a link that has changed since the member attached
            member.link = LinkSpeed(min(trips) / 2, min(to, back))
        return replace(link, to_bytes_per_s=to, from_bytes_per_s=back)
    except (OSError, CommError) as error:
        return replace(link, rtt_s=0.0, why=str(error))


def _trips(probes: Probes, clock: Callable[[], float]) -> list[float]:
    """Seconds of small messages there and back, one after the other."""
    trips: list[float] = []
    ends_s = clock() + TRIPS_S
    while len(trips) < TRIPS_AT_MOST and (clock() < ends_s or len(trips) < 2):
        trips.append(probes.took_s(probes.begin()))
    return trips


def _percentile(trips: Sequence[float]) -> float:
    return quantiles(trips, n=100, method="inclusive")[-1]


def _speed(
    took_s: Callable[[int], float], trip_s: float, burst_s: float, clock: Callable[[], float]
) -> float:
    """Bytes per second beyond the delay. Sizes grow as long as they take no longer than `burst_s`; the fastest of the
    largest counts, as small ones take hardly more than the delay."""
    size, speed, ends_s = FIRST_BYTES, 0.0, clock() + WAY_S
    while True:
        beyond_s = max(took_s(size) - trip_s, 1e-6)
        speed = max(speed, size / beyond_s)
        if clock() >= ends_s:
            return speed
        if size < PROBE_BYTES and 4 * beyond_s <= burst_s:
            size, speed = min(PROBE_BYTES, 4 * size), 0.0


class _Incast(NamedTuple):
    total: float  # bytes per second
    each: list[float]


def _with_incast(
    members: Sequence[Member], links: Sequence[LinkStatus], computing: bool
) -> tuple[list[LinkStatus], float]:
    """All members send to the head at once, each as much as would take them equally long alone; the best of several.
    Members that are gone send nothing."""
    burst_s = COMPUTING_BURST_S if computing else PROBE_BURST_S
    alive = [place for place, link in enumerate(links) if link.from_bytes_per_s > 0]
    if len(alive) < 2:
        return list(links), 0.0
    share_s = min(burst_s / len(alive), PROBE_BYTES / max(link.from_bytes_per_s for link in links))
    sizes = [max(LEAST_BYTES, int(link.from_bytes_per_s * share_s)) for link in links]
    best = max((_incast(members, links, alive, sizes) for _ in range(INCASTS)), key=lambda it: it.total)
    together = [replace(link, incast_bytes_per_s=it) for link, it in zip(links, best.each, strict=True)]
    return together, best.total


def _incast(
    members: Sequence[Member], links: Sequence[LinkStatus], alive: Sequence[int], sizes: Sequence[int]
) -> _Incast:
    begun: list[tuple[int, int]] = []
    for place in alive:
        with suppress(OSError, CommError):  # its verdict comes from its own link
            begun.append((place, members[place].probes.begin(reply_bytes=sizes[place])))
    each = [0.0] * len(links)
    for place, number in begun:
        with suppress(OSError, CommError):
            beyond_s = members[place].probes.took_s(number, sizes[place]) - links[place].rtt_s
            each[place] = sizes[place] / max(beyond_s, sizes[place] / links[place].from_bytes_per_s)
    return _Incast(sum(each), each)


def _with_waits(link: LinkStatus, roster: Roster, member: Member) -> LinkStatus:
    waits = longest_waits(roster, member)
    if waits is None:
        return link
    return replace(
        link,
        waits=waits.parts,
        wait_s=waits.median_s,
        longest_wait_s=waits.longest_s,
        part_bytes=waits.part_bytes,
    )


def longest_waits(roster: Roster, member: Member) -> WaitSummary | None:
    """Of its groups the one in which the head waits longest for it; None if it has not waited yet."""
    found = [it.waits for it in roster.contributions(member) if it.waits is not None]
    return max(found, key=lambda it: it.median_s, default=None)
