"""Where a head listens for other machines: at all of its real addresses while one may come, else only at those in use.

That is what `auto:PORT` stands for. Any other address that was asked for is listened at as long as this is a head.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence

from shoal.comm.errors import AddressError
from shoal.comm.group.channel import Channel
from shoal.comm.group.join_code import Codes
from shoal.comm.group.listener import GroupListener
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import Peers
from shoal.comm.group.streams import Address

from .own_addresses import DEFAULT_PORT, RANKS, LinkKind, OwnAddress, own_addresses, parse_address, reachable

AUTO = "auto"
DEFAULT_LISTEN = f"{AUTO}:{DEFAULT_PORT}"
MOST_OWN = 32  # addresses listened at
# Where machines of one's own are. Of the others the best kind counts if there is none of these.
REAL: frozenset[LinkKind] = frozenset({"cable", "wifi"})

log = logging.getLogger(__name__)


class Listening:
    """A head's listener at `wanted`, as HOST:PORT; while it is awaited what `follow` says last, at first somebody is.

    Raises AddressError if nothing of it can be had.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        peers: Peers,
        wanted: Sequence[str],
        codes: Codes,
        own: Callable[[], Sequence[OwnAddress]] = own_addresses,
    ) -> None:
        places = [parse_address(text) for text in wanted]
        self._own = own
        self._ports = [port for host, port in places if host == AUTO]
        self._listener = GroupListener(identity, peers, [it for it in places if it[0] != AUTO], codes)
        self._lock = threading.Lock()
        self._closed = False
        self._failed: dict[Address, AddressError] = {}
        try:
            self.follow(awaited=True, used=())
            if self._failed and not self._listener.addresses:
                raise next(iter(self._failed.values()))
        except BaseException:
            self.close()
            raise

    def follow(self, *, awaited: bool, used: Collection[Address]) -> bool:
        """`awaited`: a machine may come that is not there. `used`: own addresses over which others are attached.
        → whether that has changed where it listens"""
        if not self._ports:
            return False
        with self._lock:
            if self._closed:
                return False
            before = self._listener.addresses
            wanted = [it for it in used if it[1] in self._ports] + (self._everywhere() if awaited else [])
            failed = self._listener.also_at(wanted)
            for address in failed.keys() - self._failed.keys():
                log.warning("%s", failed[address])
            self._failed = failed
            return self._listener.addresses != before

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Those that it listens at now."""
        return self._listener.addresses

    @property
    def all_reachable(self) -> list[str]:
        """Where others reach it while one is awaited, as HOST:PORT, the likeliest first."""
        return reachable([*self.addresses, *self._everywhere()])

    def accept(self, timeout_s: float) -> Channel | None:
        """See `GroupListener`."""
        return self._listener.accept(timeout_s)

    def close(self) -> None:
        """Listen no more. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._listener.close()

    def _everywhere(self) -> list[Address]:
        if not self._ports:
            return []
        hosts = real_hosts(self._own())
        return [(host, port) for port in self._ports for host in hosts]


def real_hosts(own: Sequence[OwnAddress]) -> list[str]:
    """Those of this machine's addresses at which others are expected, the best first: not what containers, tunnels and
    machines without any address plan have, unless there is nothing else; and loopback only then."""
    there = {one.kind for one in own}
    kinds = there & REAL or {min(there, key=RANKS.__getitem__, default="cable")}
    return [one.host for one in own if one.kind in kinds][:MOST_OWN]
