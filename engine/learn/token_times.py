"""How long one answer alone waits for each of its tokens, as the latest steps tell."""

from __future__ import annotations

from collections import deque
from statistics import median

ENOUGH = 32  # steps that say what is usual
LONGEST_CONTEXT = 1536  # tokens before it: later ones take longer, and predictions are for usual requests


class TokenTimes:
    """Of steps with one row, in texts that are not long. One thread notes, another may take."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=2 * ENOUGH)

    def note(self, seconds: float, context_tokens: int) -> None:
        if context_tokens <= LONGEST_CONTEXT:
            self._latest.append(seconds)

    def take(self) -> float | None:
        """Seconds of a usual token since the last time; None while there were too few steps to tell."""
        if len(self._latest) < ENOUGH:
            return None
        taken = list(self._latest)
        self._latest.clear()
        return median(taken)
