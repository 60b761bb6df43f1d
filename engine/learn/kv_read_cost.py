"""When KV is read back from disk instead of computed, and how much of it in one step.

Both costs are learnt: what a page takes to read from the reads, what a token takes to compute from the steps. Pure:
measured seconds are handed in.
"""

from __future__ import annotations

ALONE_S = 0.1  # a step may read so long when it answers nobody else; a newcomer waits for that
_FOLLOW = 0.2  # how quickly averages follow what is measured
_KEPT = 0.95  # of the average, whenever it says that reading does not pay: it is tried again some day


def followed(average: float, measured: float) -> float:
    """The average after one more measurement; 0 = nothing has been measured before."""
    return average + _FOLLOW * (measured - average) if average else measured


class ReadCost:
    """What pages take to be read, in seconds."""

    def __init__(self) -> None:
        self._page_s = 0.0  # 0 = nothing measured yet

    def note(self, pages: int, seconds: float) -> None:
        """Reading so many pages took `seconds`."""
        self._page_s = followed(self._page_s, seconds / pages)

    def pays(self, pages: int, tokens: int, token_s: float) -> bool:
        """Whether so many pages are read sooner than `tokens` tokens are computed; yes while one is not known."""
        if not token_s or pages * self._page_s <= tokens * token_s:
            return True
        self._page_s *= _KEPT
        return False

    def most_pages(self, answers_s: float) -> int:
        """Pages for one step, at least one: the reading may take as long as the answers that it holds up, whose step
        takes `answers_s` (0 = there are none)."""
        return max(1, int((answers_s or ALONE_S) / self._page_s)) if self._page_s else 1
