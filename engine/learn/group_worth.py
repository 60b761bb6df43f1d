"""Whether a group computes long steps sooner than rank 0 would alone, as the steps themselves teach.

That it does was predicted, from figures of each machine and link. Machines that wait for each other can lose more than
these tell. So the group is used until it takes longer than rank 0 is thought to; then one step alone shows what that
takes really. What is thought of the way that is not gone shrinks with each step, or one would never learn that a
prediction was wrong. Pure: durations are handed in.
"""

from __future__ import annotations

from collections import deque

from .step_cost import StepSeconds

_TIMES = 3  # of which the best counts: something else may just have run
# What each step forgives the way that it does not go, as a part of the step: so much is lost by trying, however slow
# the other way is. A group was chosen for good reasons, so that rank 0 may be faster is tried less often.
_FORGIVEN, _DOUBTED = 0.03, 0.007
# Of what rank 0 took longer than expected, with each step together: something else may have run.
_FORGOTTEN = 0.02


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
            self._together = deque((it - _FORGIVEN * took for it in self._together), _TIMES)
            return
        if self._anew:
            self._together.clear()
        self._anew = False
        self._together.append(took)
        self._alone -= _DOUBTED * min(self._together) + _FORGOTTEN * max(0.0, self._alone - 1)
