"""The axes of a plot: from zero to where the data end. Whoever draws says what is between. Numbers in, shapes out."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor, log10

from .shapes import Drawn, Stroke, Words

LEFT = 64
WIDTH, HEIGHT = 720, 440
_RIGHT, _BELOW = 24, 52
_STEPS = 5  # of each axis, at least, and twice as many at most
_BEYOND = 1.03  # times the largest value is where an axis ends


class Axes:
    """`across` and `up` name the axes, which reach a little beyond the `most` of each. `top`: what stays free above."""

    def __init__(self, across: str, up: str, most_across: float, most_up: float, top: int = _RIGHT) -> None:
        self._names = across, up
        self.most_across, self.most_up = (_BEYOND * (it if it > 0 else 1.0) for it in (most_across, most_up))
        self.top = top
        self.right, self.bottom = self.x(self.most_across), self.y(0)

    def x(self, value: float) -> float:
        return round(LEFT + value / self.most_across * (WIDTH - LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - _BELOW - value / self.most_up * (HEIGHT - _BELOW - self.top), 1)

    def shapes(self) -> Iterator[Drawn]:
        for up in _round_numbers(self.most_up):
            yield Stroke(((LEFT, self.y(up)), (self.right, self.y(up))), "#dddddd")
            yield Words((LEFT - 8, self.y(up) + 4), f"{up:.3g}", "end")
        for across in _round_numbers(self.most_across):
            yield Words((self.x(across), self.bottom + 18), f"{across:.3g}", "middle")
        across_name, up_name = self._names
        yield Words(((LEFT + self.right) / 2, HEIGHT - 12), across_name, "middle")
        yield Words((16, (self.top + self.bottom) / 2), up_name, "middle", upwards=True)


def _round_numbers(most: float) -> Iterator[float]:
    """From zero to `most` at most, in steps that are easy to read."""
    unit = 10.0 ** floor(log10(most / _STEPS))
    step = max(unit * part for part in (1, 2, 2.5, 5) if unit * part * _STEPS <= most)
    for number in range(int(most / step) + 1):
        yield number * step
