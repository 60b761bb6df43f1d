"""A pulse: how far a compute thread is, for others to see whether it still comes on.

A live socket says nothing about the thread behind it. So beats carry these counters.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Pulse:
    """Written by the compute thread, read by any. `at_work`: it computes, and does not wait for other ranks."""

    epoch: int = 0
    steps: int = 0
    blocks: int = 0
    at_work: bool = False

    def still_wanted(self, share: float) -> bool:
        """For `Rank.run`, which asks at every block: counts it. Giving up comes with the data."""
        self.blocks += 1
        return True


class Watched:
    """What somebody else sees of a pulse, and since when it has not changed."""

    def __init__(self) -> None:
        self._seen: tuple[int, ...] | None = None
        self._since_s = 0.0

    def still_s(self, seen: tuple[int, ...], now_s: float) -> float:
        """For how long it has been like that."""
        if seen != self._seen:
            self._seen, self._since_s = seen, now_s
        return now_s - self._since_s

    def excuse(self, seconds: float) -> None:
        """So much of the time does not count."""
        self._since_s += seconds
