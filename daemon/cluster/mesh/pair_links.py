"""What is known of the links between workers: measured when they met, assumed before, or none.

Until two workers have met, their link is taken to be as long and as thin as the worse of their links to the head: that
is right where all are in one network. Whatever was measured is forgotten when one of the two attaches anew.
"""

from __future__ import annotations

import threading
from typing import Protocol

from shoal.partition.machines import LinkSpeed


class Linked(Protocol):
    """A member, as far as this module knows."""

    fingerprint: str
    link: LinkSpeed  # to the head


class PairLinks:
    """By fingerprints. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[frozenset[str], LinkSpeed | None] = {}
        self._parted: set[frozenset[str]] = set()

    def between(self, one: Linked, other: Linked) -> LinkSpeed | None:
        """None if they do not reach each other."""
        with self._lock:
            pair = frozenset((one.fingerprint, other.fingerprint))
            if pair in self._parted:
                return None
            if pair in self._found:
                return self._found[pair]
        latency_s = max(one.link.latency_s, other.link.latency_s)
        return LinkSpeed(latency_s, min(one.link.bytes_per_s, other.link.bytes_per_s))

    def note(self, one: Linked, other: Linked, link: LinkSpeed | None) -> None:
        """What was measured, or that they do not reach each other. A link is as good as it was at its best: it may have
        been measured while weights went over it."""
        with self._lock:
            pair = frozenset((one.fingerprint, other.fingerprint))
            before = self._found.get(pair)
            if link is not None and before is not None:
                link = LinkSpeed(
                    min(link.latency_s, before.latency_s), max(link.bytes_per_s, before.bytes_per_s)
                )
            self._found[pair] = link

    def part(self, one: Linked, other: Linked) -> None:
        """They lost each other in the middle of a step. That they meet again does not count: they may lose it again."""
        with self._lock:
            self._parted.add(frozenset((one.fingerprint, other.fingerprint)))

    def forget(self, fingerprint: str) -> None:
        with self._lock:
            self._found = {pair: link for pair, link in self._found.items() if fingerprint not in pair}
            self._parted = {pair for pair in self._parted if fingerprint not in pair}
