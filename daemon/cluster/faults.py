"""Which machines are passed over for a while, because groups that they were in have failed by them.

A machine that was lost once may come back at once: it was restarted. One that is lost again and again, though it
attaches each time, would keep its group from ever ending an answer. So it waits, twice as long each time. One that
refuses its part waits from the first time on: asked again at once it would refuse again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 600.0
FORGOTTEN_S = 1800.0  # without a fault


@dataclass
class _Record:
    faults: int = 0
    at_s: float = 0.0
    until_s: float = 0.0  # it is passed over


class Faults:
    """By fingerprint. Any thread may call it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: dict[str, _Record] = {}
        self._lock = threading.Lock()

    def lost(self, fingerprint: str) -> None:
        """A group lost it."""
        self._add(fingerprint, 1)

    def refused(self, fingerprint: str) -> None:
        """It did not take its part."""
        self._add(fingerprint, 0)

    def passed_over(self, fingerprint: str) -> bool:
        return self.left_s(fingerprint) > 0

    def left_s(self, fingerprint: str) -> float:
        """For how long it is still passed over."""
        with self._lock:
            found = self._records.get(fingerprint, _Record())
            return max(0.0, found.until_s - self._clock())

    @property
    def over(self) -> int:
        """For how many a pause has ended."""
        with self._lock:
            return sum(0 < it.until_s <= self._clock() for it in self._records.values())

    def _add(self, fingerprint: str, free: int) -> None:
        with self._lock:
            now_s = self._clock()
            found = self._records.setdefault(fingerprint, _Record())
            if now_s - found.at_s > FORGOTTEN_S:
                found.faults = 0
            found.faults += 1
            found.at_s = now_s
            if (counted := found.faults - free) > 0:
                found.until_s = now_s + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(counted - 1, 20))
