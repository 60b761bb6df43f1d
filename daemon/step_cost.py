"""What a step costs by its rows, learnt from the steps themselves.

seconds(rows) = pace × shape(rows). The pace is how fast the machine is just now and follows every step quickly, as
neighbours come and go; the shape is what more rows cost in proportion, piecewise linear between powers of two, and
follows slowly. So a fast minute cannot make yesterday's long steps look dear. Pure: durations are handed in, by
whoever has the clock; whether the time went into arithmetic, memory or a disk makes no difference here.
"""

from __future__ import annotations

import math

_FIRST_GUESS = 0.15  # one more row, as a share of a step of one: about what reading the weights leaves
_PACE_RATE = 0.2
_SHAPE_RATE = 0.1  # of a point measured often; the first measurements count more
_SURPRISE = 1.0  # most that one measurement may differ, as a logarithm: a step held up is not believed
_POINTS = 17  # the shape is known at 1, 2, 4, … 65536 rows


class StepCost:
    """Cost of steps of one model. `row_share`: first guess of what one more row costs, as a share of a step of one.

    For weights that are streamed from a disk the share is smaller and longer drafts pay; it is found out anyhow.
    """

    def __init__(self, row_share: float = _FIRST_GUESS) -> None:
        self._pace_s = 0.0  # a step of one row; 0 = nothing measured yet
        self._shape = [1 + row_share * ((1 << point) - 1) for point in range(_POINTS)]
        self._measured = [0.0] * _POINTS

    @property
    def measured(self) -> bool:
        return self._pace_s > 0

    def seconds(self, rows: int) -> float:
        """Expected duration of a step of `rows` rows; in steps of one row while nothing has been measured."""
        point, beyond = _place(rows)
        shape = self._shape
        relative = shape[point] + beyond * (shape[point + 1] - shape[point])
        return relative * (self._pace_s or 1.0)

    def note(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took `seconds`."""
        seconds = max(seconds, 1e-9)
        if not self._pace_s:
            self._pace_s = seconds / self.seconds(rows)
            return
        surprise = math.log(seconds / self.seconds(rows))
        surprise = max(-_SURPRISE, min(_SURPRISE, surprise))
        self._pace_s *= math.exp(_PACE_RATE * surprise)
        point, beyond = _place(rows)
        self._bend(point, (1 - beyond), surprise)
        self._bend(point + 1, beyond, surprise)

    def _bend(self, point: int, weight: float, surprise: float) -> None:
        """Move a point of the shape, its first measurements more; the first point is 1 and stays so."""
        if point and weight:
            self._measured[point] += weight
            rate = max(_SHAPE_RATE, 1 / (1 + self._measured[point]))
            self._shape[point] = max(1.0, self._shape[point] * math.exp(rate * weight * surprise))
            self._extend(point)

    def _extend(self, point: int) -> None:
        """Points after `point`, up to the next that has been measured, lie on the line from the first through it."""
        row_share = (self._shape[point] - 1) / ((1 << point) - 1)
        for beyond in range(point + 1, _POINTS):
            if self._measured[beyond] >= 1:
                return
            self._shape[beyond] = 1 + row_share * ((1 << beyond) - 1)


def _place(rows: int) -> tuple[int, float]:
    """The point at or before `rows`, and how far `rows` lies on the way to the next, in [0, 1)."""
    point = min(rows.bit_length() - 1, _POINTS - 2)
    return point, min(rows / (1 << point) - 1, 1.0)
