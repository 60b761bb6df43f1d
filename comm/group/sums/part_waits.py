"""How long a hub waits for the parts of one rank: what tells which member of a group holds up the others.

Knows the latest waits only. Noting one costs less than a microsecond.
"""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

LATEST = 64


class WaitSummary(NamedTuple):
    """Of the latest `parts` parts. `part_bytes` is their median size."""

    parts: int
    median_s: float
    longest_s: float
    part_bytes: int


class PartWaits:
    """One thread notes; any reads."""

    def __init__(self) -> None:
        self._latest: list[tuple[float, int]] = [(0.0, 0)] * LATEST
        self._count = 0

    def note(self, seconds: float, nbytes: int) -> None:
        """The hub was ready, and got a part of so many bytes so much later."""
        self._latest[self._count % LATEST] = seconds, nbytes
        self._count += 1

    def summary(self) -> WaitSummary | None:
        """None if there was no part yet."""
        if not (count := min(self._count, LATEST)):
            return None
        waits, sizes = zip(*self._latest[:count], strict=True)
        return WaitSummary(count, median(waits), max(waits), int(median(sizes)))
