"""How a worker reaches its head: of all addresses of the head that answer, the one that was measured to be the best.

The head says at each attempt where else it is, so a cable is found by a worker that was paired over Wi-Fi. What was
chosen is used by every channel as long as the worker stays attached, whatever interfaces come meanwhile.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.comm.errors import CommError
from shoal.comm.group.channel import Channel
from shoal.comm.group.dialing import OTHERS_S, dial, dial_all
from shoal.comm.group.discovery import FINGERPRINT_DIGITS, FoundHead, addresses_of
from shoal.comm.group.errors import ChannelError, Forgotten, NotPaired
from shoal.comm.group.group_protocol import Purpose
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import MAX_ADDRESSES, Peers
from shoal.comm.group.streams import Address
from shoal.daemon.cluster.control_messages import CONTROL_BYTES, HeadAt
from shoal.daemon.cluster.links.link_probes import PROBED_S, measured
from shoal.daemon.errors import DaemonError

from .own_addresses import parse_address, spelled

HEAD_DIAL_S = 5.0
MEASURE_ROUTE_S = 0.25  # for each of the two figures
ROUTE_SUM_BYTES = 16 << 10  # of a sum of one token's hidden states: what is sent most often
ROUTES_ALIKE = 1.15  # routes whose times differ by less are equally good
LOOK_AGAIN_S = 30.0  # between searches for a head that is at none of its addresses

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Route:
    """`address` of the head is the best of `compared`. `rtt_s`: there and back."""

    address: Address
    rtt_s: float
    bytes_per_s: float
    compared: int
    head_version: str = ""

    @property
    def sum_s(self) -> float:
        """How long one token's sum takes there and back."""
        return self.rtt_s + 2 * ROUTE_SUM_BYTES / max(1.0, self.bytes_per_s)


class HeadRoute:
    """Of the head with this fingerprint. `look`: which heads are on the local network; called if it is at none of its
    addresses, for it may have got others, and somebody else may have got these."""

    def __init__(
        self,
        identity: NodeIdentity,
        peers: Peers,
        fingerprint: str,
        look: Callable[[], list[FoundHead]] = list,
    ) -> None:
        self.identity, self._peers, self._fingerprint, self._look = identity, peers, fingerprint, look
        self._look_s = 0.0
        self.now: Route | None = None
        self.own_host = ""  # this machine's address on that route

    def dial(self, purpose: Purpose) -> Channel:
        """A channel to the head: one for control over the best route, which is found first; the others over the same.
        Raises CommError and OSError."""
        if purpose == "control":
            self.now = self._best()
        assert self.now is not None
        channel = dial(
            self.identity, self._peers, self._fingerprint, purpose, [self.now.address], timeout_s=HEAD_DIAL_S
        )
        self.own_host = channel.local[0]
        return channel

    def _best(self) -> Route:
        remembered = self._peers.get(self._fingerprint).addresses
        channels: list[Channel] = []
        try:
            channels += self._reached(remembered)
            here: dict[Address, HeadAt] = {}
            for channel in [*channels]:
                self._hear(channel, here)
            told = list(dict.fromkeys(address for one in here.values() for address in _told(one, here)))
            tried = {*remembered, *(channel.remote for channel in channels)}
            if new := [address for address in told if address not in tried]:
                more = self._tried(new)
                channels += more
                for channel in more:
                    self._hear(channel, here)
            routes = self._measured(channels, here, [*remembered, *told])
        finally:
            for channel in channels:
                channel.close()
        least_s = min(route.sum_s for route in routes)
        best = next(route for route in routes if route.sum_s <= ROUTES_ALIKE * least_s)
        others = [route.address for route in sorted(routes, key=lambda route: route.sum_s)]
        self._remember(list(dict.fromkeys([best.address, *others, *told, *remembered]))[:MAX_ADDRESSES])
        if best.compared > 1:
            figures = f"{1000 * best.rtt_s:.2g} ms, {best.bytes_per_s / 1e6:.3g} MB/s"
            log.info("%s is the best of %d addresses (%s)", spelled(best.address), best.compared, figures)
        return best

    def _reached(self, remembered: Sequence[Address]) -> list[Channel]:
        """Channels for measuring to all of `remembered` that answer, or else to where the head is found now."""
        try:
            return self._dialled(remembered, HEAD_DIAL_S)
        except Forgotten:  # by the head itself, which is there
            raise
        except (ChannelError, NotPaired):
            if (now_s := time.monotonic()) < self._look_s:
                raise
            self._look_s = now_s + LOOK_AGAIN_S
            found = addresses_of(
                head for head in self._looked() if self._fingerprint.startswith(head.fingerprint)
            )
            if not (new := [address for address in found if address not in remembered]):
                raise
            return self._dialled(new, HEAD_DIAL_S)

    def _looked(self) -> list[FoundHead]:
        """Those that say which they are."""
        try:
            return [head for head in self._look() if len(head.fingerprint) == FINGERPRINT_DIGITS]
        except OSError as error:
            log.debug("heads cannot be looked for: %s", error)
            return []

    def _tried(self, addresses: Sequence[Address]) -> list[Channel]:
        try:
            return self._dialled(addresses, OTHERS_S)
        except CommError as error:
            log.debug("the head's other addresses do not answer: %s", error)
            return []

    def _dialled(self, addresses: Sequence[Address], timeout_s: float) -> list[Channel]:
        return dial_all(self.identity, self._peers, self._fingerprint, "measure", addresses, timeout_s)

    def _hear(self, channel: Channel, here: dict[Address, HeadAt]) -> None:
        """Where the head is, as it says itself."""
        try:
            here[channel.remote] = channel.receive_message(HeadAt, PROBED_S, CONTROL_BYTES)
        except (CommError, OSError) as error:
            log.debug("%s does not answer: %s", spelled(channel.remote), error)

    def _measured(
        self, channels: Sequence[Channel], here: dict[Address, HeadAt], order: Sequence[Address]
    ) -> list[Route]:
        """In the order in which the head or former attempts prefer them. One at a time: they may share a link."""
        links = {}
        failure: CommError | OSError | None = None
        for channel in {channel.remote: channel for channel in channels if channel.remote in here}.values():
            try:
                links[channel.remote] = measured(channel, MEASURE_ROUTE_S)
            except (CommError, OSError) as error:
                failure = error
        if not links:
            raise failure or OSError("the head does not answer")
        places = {address: place for place, address in reversed([*enumerate(order)])}
        return [
            Route(address, 2 * link.latency_s, link.bytes_per_s, len(links), here[address].version)
            for address, link in sorted(links.items(), key=lambda it: places.get(it[0], len(order)))
        ]

    def _remember(self, addresses: list[Address]) -> None:
        try:
            self._peers.reached(self._fingerprint, tuple(addresses))
        except (CommError, OSError) as error:
            log.warning("where the head is cannot be remembered: %s", error)


def _told(said: HeadAt, here: dict[Address, HeadAt]) -> list[Address]:
    """Addresses that a head says it has, and that may lead to it from here: its loopback does only if it was reached
    at one."""
    same = any(_loopback(host) for host, _ in here)
    found: list[Address] = []
    for text in said.addresses:
        try:
            host, port = parse_address(text)
            plain = str(ipaddress.ip_address(host))
        except (DaemonError, ValueError):
            continue
        if port and (same or not _loopback(plain)):
            found.append((plain, port))
    return found[:MAX_ADDRESSES]


def _loopback(host: str) -> bool:
    return ipaddress.ip_address(host.split("%")[0]).is_loopback
