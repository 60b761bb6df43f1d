"""How the head introduces the workers of a group to each other, and hears who reaches whom.

Every worker is told the others' certificates with its shard, and says where it listens. When all have, each is told
where the others are, and answers whom it has reached. Nothing depends on it: who is not reached in time, or not at all,
gets sums by way of the head.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.comm.group.streams import Address
from shoal.daemon.cluster.control_messages import Fellow, FellowAt, FromHead, Introduce, Listens, Met
from shoal.daemon.cluster.routes.own_addresses import parse_address, spelled
from shoal.daemon.errors import DaemonError
from shoal.partition.machines import LinkSpeed

from .fellows import MEET_S

LISTENS_S = 5.0  # until all have said where they listen
MET_ANSWER_S = 1.0  # for an answer beyond the time of meeting

log = logging.getLogger(__name__)


class Introducible(Protocol):
    """A member, as far as this module knows."""

    @property
    def name(self) -> str: ...

    @property
    def address(self) -> str: ...

    @property
    def certificate(self) -> bytes: ...

    @property
    def meets_fellows(self) -> bool: ...

    def send(self, message: FromHead) -> None: ...


class Introductions:
    """Of `members`, which are ranks 1, 2, …; `ended` is called once, when everything is known that will be."""

    def __init__(
        self,
        epoch: int,
        members: Sequence[Introducible],
        ended: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._epoch = epoch
        self._members = members
        self._ended = ended
        self._clock = clock
        self._lock = threading.Lock()
        self._listens: dict[int, Listens] = {}
        self._met: dict[int, Met] = {}
        self.useful = len(members) > 1 and all(it.meets_fellows and it.certificate for it in members)
        self._ends_s = clock() + LISTENS_S

    def fellows(self, rank: int) -> list[Fellow]:
        """Whom the member that is `rank` is to let in."""
        if not self.useful:
            return []
        others = [*enumerate(self._members, 1)]
        return [Fellow(rank=it, certificate=member.certificate) for it, member in others if it != rank]

    def heard(self, rank: int, message: Listens | Met) -> None:
        """What the member that is `rank` has said. From any thread."""
        ended = False
        with self._lock:
            if isinstance(message, Listens):
                if rank in self._listens:
                    return
                self._listens[rank] = message
                begin = len(self._listens) == len(self._members)
                if begin:
                    self._ends_s = self._clock() + MEET_S + MET_ANSWER_S
            else:
                begin = False
                self._met[rank] = message
                ended = len(self._met) == len(self._members)
        if begin:
            for each, member in enumerate(self._members, 1):
                member.send(Introduce(epoch=self._epoch, fellows=self._at(each)))
        if ended:
            self._ended()

    @property
    def over(self) -> bool:
        """Whether no more is waited for."""
        return not self.useful or len(self._met) == len(self._members) or self._clock() > self._ends_s

    @property
    def links(self) -> dict[tuple[int, int], LinkSpeed]:
        """Between ranks, lower first, of which both say that they reach each other."""
        with self._lock:
            met = {rank: {it.rank: it for it in said.fellows} for rank, said in self._met.items()}
        found = {}
        for high, fellows in met.items():
            for low, figures in fellows.items():
                back = met.get(low, {}).get(high)
                if low < high and back is not None and not figures.trouble and not back.trouble:
                    found[low, high] = LinkSpeed(figures.latency_s, figures.bytes_per_s)
        return found

    @property
    def apart(self) -> list[str]:
        """Who does not reach whom, and why, for people. Once it is over."""
        if not self.useful:
            return []
        links, said = self.links, []
        for high, member in enumerate(self._members, 1):
            for low, other in enumerate(self._members[: high - 1], 1):
                if (low, high) not in links:
                    met = self._met.get(high)
                    found = next((it for it in met.fellows if it.rank == low), None) if met else None
                    why = found.trouble if found is not None and found.trouble else "no answer"
                    said.append(f"{member.name} does not reach {other.name} ({why})")
        return said

    def _at(self, rank: int) -> list[FellowAt]:
        others = [*enumerate(self._members, 1)]
        return [
            FellowAt(rank=it, addresses=_reached_at(self._listens[it].addresses, member.address))
            for it, member in others
            if it != rank
        ]


def _reached_at(said: Sequence[str], seen: str) -> list[str]:
    """Addresses as a worker says them, and as the head sees its machine, with the same ports."""
    found: list[Address] = []
    for text in said:
        try:
            host, port = parse_address(text, with_host=True)
            found.append((str(ipaddress.ip_address(host)), port))
        except (DaemonError, ValueError):
            continue
    if seen and "%" not in seen:
        found += [(seen, port) for _, port in found]
    return [spelled(it) for it in dict.fromkeys(found)][:16]
