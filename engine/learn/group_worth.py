"""Whether a group computes long steps sooner than rank 0 would alone, as the steps themselves teach.

That it does was predicted, from figures of each machine and link. Machines that wait for each other can lose more than
these tell. So the group is used until it takes longer than rank 0 is thought to; then one step alone shows what that
takes really. Pure: durations are handed in.
"""

from __future__ import annotations

from collections import deque

from .step_cost import StepSeconds

_TIMES = 3  # of which the best counts: something else may just have run
_FORGOTTEN = 0.02  # of what was found of one way, with each step that goes the other


class GroupWorth:
    """`expected`: what steps by their rows are thought to take alone. Times are counted in that."""

    def __init__(self, expected: StepSeconds) -> None:
        self._expected = expected
        self._alone = 1.0
        self._anew = True  # the next step together is the first, or since one alone
        self._together: deque[float] = deque([0.0], _TIMES)

    @property
    def pays(self) -> bool:
        """Whether the next long step is for the group."""
        return min(self._together) <= self._alone

    def note(self, rows: int, seconds: float, *, together: bool) -> None:
        """A long step of so many rows took so long."""
        took = seconds / self._expected(rows)
        if not together:
            self._alone, self._anew = took, True
            self._together = deque(((1 - _FORGOTTEN) * it for it in self._together), _TIMES)
            return
        if self._anew:
            self._together.clear()
        self._anew = False
        self._together.append(took)
        self._alone += _FORGOTTEN * (1 - self._alone)
