"""Nodes that a third one has introduced to each other, for as long as that third one wants: known by certificate.

Two workers of a group are not paired. Their head, whom both trust, names them to each other. What it said is kept in
memory, and ends with the group.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping

from .errors import ChannelError, NotPaired
from .node_identity import check_readable, fingerprint
from .peers import Closable, PairedNode

MAX_CHANNELS_INTRODUCED = 16  # open at a time with one node


class Introduced:
    """`certificates`: of other nodes, by rank. ChannelError if one cannot be read, or is there twice."""

    def __init__(self, certificates: Mapping[int, bytes]) -> None:
        try:
            for certificate in certificates.values():
                check_readable(certificate)
        except ValueError as error:
            raise ChannelError(f"a node was introduced with {error}") from error
        self._nodes = tuple(PairedNode(f"rank {rank}", "worker", it) for rank, it in certificates.items())
        self._ranks = {fingerprint(it): rank for rank, it in certificates.items()}
        if len(self._ranks) < len(certificates):
            raise ChannelError("a node was introduced twice")
        self._lock = threading.Lock()
        self._channels: dict[str, weakref.WeakSet[Closable]] = {one: weakref.WeakSet() for one in self._ranks}
        self._closed = False

    def listed(self) -> tuple[PairedNode, ...]:
        """All of them; always the same object."""
        return self._nodes

    def get(self, fingerprint: str) -> PairedNode:
        """NotPaired if it was not introduced, or that is over."""
        if not self._closed:
            for node in self._nodes:
                if node.fingerprint == fingerprint:
                    return node
        raise NotPaired("this node was not introduced, or is no longer")

    def rank(self, fingerprint: str) -> int:
        """NotPaired if it was not introduced."""
        self.get(fingerprint)
        return self._ranks[fingerprint]

    def hold(self, fingerprint: str, channel: Closable) -> None:
        """Close `channel` with all others. NotPaired if that has happened; ChannelError at too many."""
        with self._lock:
            self.get(fingerprint)
            held = self._channels[fingerprint]
            if sum(not other.closed for other in held) >= MAX_CHANNELS_INTRODUCED:
                raise ChannelError(f"{MAX_CHANNELS_INTRODUCED} channels are open with this node already")
            held.add(channel)

    def close(self) -> None:
        """Nobody is known any more, and all channels are closed. Idempotent."""
        with self._lock:
            self._closed = True
            channels = [channel for held in self._channels.values() for channel in held]
        for channel in channels:
            channel.close()
