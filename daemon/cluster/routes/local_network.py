"""What this machine says and asks on the local network, so that nobody has to type addresses.

A head says where it is as long as it listens, anew when its addresses change. Nothing of it exists on other machines.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.comm.group.discovery import BROWSE_S, Announcement, FoundHead, find_heads
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import MAX_ADDRESSES
from shoal.comm.group.streams import Address

from .own_addresses import own_addresses, parse_address

ANNOUNCE_LOOK_S = 10.0  # between looks whether addresses have changed

log = logging.getLogger(__name__)


class Spoken(Protocol):
    def close(self) -> None: ...


class LocalNetwork:
    """The real one. Both methods raise OSError where there is no multicast."""

    def announce(self, head: FoundHead) -> Spoken:
        return Announcement(head, [host for host, _ in head.addresses])

    def find(self, fingerprint: str = "") -> list[FoundHead]:
        """All heads, or those with this fingerprint. Takes `BROWSE_S`."""
        return find_heads(interfaces(), BROWSE_S, fingerprint)


class Announcer:
    """Says where a head is until it is closed; in a thread of its own, since that takes a moment."""

    def __init__(
        self, network: LocalNetwork, identity: NodeIdentity, addresses: Callable[[], list[str]]
    ) -> None:
        self._network, self._identity, self._addresses = network, identity, addresses
        self._closed = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoal-announce", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Look now whether addresses have changed."""
        self._changed.set()

    def close(self) -> None:
        """Idempotent."""
        self._closed.set()
        self._changed.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        said: tuple[Address, ...] = ()
        now: Spoken | None = None
        complained = ""
        while True:
            wanted = announced(self._addresses())
            try:
                if wanted != said or (wanted and now is None):
                    if now is not None:
                        now.close()
                        now = None
                    said = wanted
                    if wanted:
                        head = FoundHead(self._identity.name, self._identity.fingerprint, wanted)
                        now = self._network.announce(head)
                        complained = ""
            except Exception as error:  # of a library that talks to whatever is on the network
                if str(error) != complained:
                    log.warning(
                        "other machines must name this one's address, it cannot be announced: %s", error
                    )
                complained = str(error)
            self._changed.wait(ANNOUNCE_LOOK_S)
            self._changed.clear()
            if self._closed.is_set():
                break
        if now is not None:
            now.close()


def announced(addresses: Sequence[str]) -> tuple[Address, ...]:
    """Those of this machine's addresses, as HOST:PORT, that are of use to others."""
    parsed = [parse_address(text) for text in addresses]
    return tuple((host, port) for host, port in parsed if _for_others(host))[:MAX_ADDRESSES]


def interfaces() -> list[str]:
    """Addresses of the interfaces at which heads are looked for."""
    return [one.host for one in own_addresses() if one.kind != "loopback"][:MAX_ADDRESSES]


def _for_others(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False
