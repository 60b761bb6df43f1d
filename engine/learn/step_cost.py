"""What a step costs by its rows, learnt from the steps themselves.

seconds(rows) = pace × shape(rows). The pace is how fast the machine is just now and follows every step quickly, as
neighbours come and go. The shape is what rows cost in proportion: it follows slowly and is linear between points, which
lie close together where kernels change their method. So a fast minute cannot make yesterday's long steps look dear.
Pure: callers measure the durations. Whether the time went into arithmetic, memory or a disk makes no difference.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise

from shoal.partition.hardware_guesses import ROW_SHARE

_PACE_RATE = 0.2
_SHAPE_RATE = 0.1  # of a point measured often; the first measurements count more
_SURPRISE = 1.0  # most that one measurement may differ, as a logarithm: a step held up is not believed
_KNOWN = 0.5  # measurements that make a point known
_KEPT = 0.995  # of a measurement with every further step: what was dear once is tried again some day
# Rows at which the shape has points: every one up to 8, then two for each doubling.
_ROWS = (*range(1, 9), *(rows << doubling for doubling in range(8) for rows in (12, 16)))


StepSeconds = Callable[[int], float]
"""What a step of so many rows is expected to take."""


def evenly(row_share: float = ROW_SHARE) -> StepSeconds:
    """Every further row costs as much, this share of a step of one row, which is the unit."""

    def expected(rows: int) -> float:
        return 1 + row_share * (rows - 1)

    return expected


class StepCost:
    """Cost of steps of one model. `expected`: what is thought of them before any was measured.

    Where weights are streamed from a disk, further rows cost little and long drafts pay. That would be learnt anyhow,
    but slow steps are few.
    """

    def __init__(self, expected: StepSeconds | None = None) -> None:
        expected = expected or evenly()
        self._pace_s = 0.0  # 0 = nothing measured yet
        self._expected_s = max(1e-9, expected(1))
        self._shape = [max(1e-9, expected(rows)) / self._expected_s for rows in _ROWS]
        self._measured = [0.0] * len(_ROWS)

    @property
    def measured(self) -> bool:
        return self._pace_s > 0

    def seconds(self, rows: int) -> float:
        """Expected duration of a step of `rows` rows."""
        point, beyond = _place(rows)
        shape = self._shape
        relative: float = shape[point] + beyond * (shape[point + 1] - shape[point])
        return relative * (self._pace_s or self._expected_s)

    def note(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took `seconds`."""
        seconds = max(seconds, 1e-9)
        if not self._pace_s:
            self._pace_s = self._expected_s * seconds / self.seconds(rows)
        surprise = math.log(seconds / self.seconds(rows))
        surprise = max(-_SURPRISE, min(_SURPRISE, surprise))
        point, beyond = _place(rows)
        ends = ((point, 1 - beyond), (point + 1, beyond))
        square = beyond**2 + (1 - beyond) ** 2
        ignorance = 0.0  # how much of the surprise comes from not knowing these points well
        first, *others = self._measured  # the first point sets the pace, so it is settled once
        self._measured = [first, *(measured * _KEPT for measured in others)]
        for end, weight in ends:
            self._measured[end] += weight
            rate = 1 / (1 + self._measured[end])
            if end:
                rate = max(rate, _SHAPE_RATE)
            ignorance += rate * weight
            self._shape[end] *= math.exp(rate * weight / square * surprise)
        self._pace_s *= math.exp(_PACE_RATE * (1 - ignorance) * surprise)
        self._fill()

    def _fill(self) -> None:
        """Put unknown points on the lines between known ones, and those beyond the last on the line from the first to
        it. That line never falls: the first may have been measured in a slow moment, and no time is negative."""
        known = [point for point, measured in enumerate(self._measured) if measured >= _KNOWN]
        for low, high in pairwise(known):
            self._draw(low, range(low + 1, high), self._slope(low, high))
        if len(known) > 1:
            last = known[-1]
            self._draw(last, range(last + 1, len(_ROWS)), max(0.0, self._slope(known[0], last)))

    def _slope(self, low: int, high: int) -> float:
        slope: float = (self._shape[high] - self._shape[low]) / (_ROWS[high] - _ROWS[low])
        return slope

    def _draw(self, start: int, points: range, slope: float) -> None:
        """Put points on a line from another."""
        for point in points:
            self._shape[point] = self._shape[start] + slope * (_ROWS[point] - _ROWS[start])


def _place(rows: int) -> tuple[int, float]:
    """The point at or before `rows`, and how far `rows` lies on the way to the next, in [0, 1]."""
    point = min(bisect_right(_ROWS, rows), len(_ROWS) - 1) - 1
    return point, min((rows - _ROWS[point]) / (_ROWS[point + 1] - _ROWS[point]), 1.0)
