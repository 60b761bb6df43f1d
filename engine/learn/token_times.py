"""How long one answer alone waits for each of its tokens, as the latest steps tell."""

from __future__ import annotations

from collections import deque
from statistics import median

ENOUGH = 32  # steps that say what is usual


class TokenTimes:
    """Of steps with one row. One thread notes, another may take."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=2 * ENOUGH)

    def note(self, seconds: float) -> None:
        self._latest.append(seconds)

    def take(self) -> float | None:
        """Seconds of a usual token since the last time; None while there were too few steps to tell."""
        if len(self._latest) < ENOUGH:
            return None
        taken = list(self._latest)
        self._latest.clear()
        return median(taken)
