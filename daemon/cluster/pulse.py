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


@dataclass
class Watched:
    """What somebody else saw of a pulse, and since when it has not changed."""

    seen: tuple[int, int, int, bool] = (0, 0, 0, False)
    since_s: float = 0.0

    def frozen_s(self, seen: tuple[int, int, int, bool], now_s: float) -> float:
        """For how long a thread at work has not come further."""
        if seen != self.seen or not seen[3]:
            self.seen, self.since_s = seen, now_s
        return now_s - self.since_s
