"""The axes of a plot: both begin at zero. Whoever draws says what is between them. Numbers in, shapes out."""

from __future__ import annotations

from collections.abc import Iterator

from .shapes import Drawn, Stroke, Words

LEFT = 64
WIDTH, HEIGHT = 720, 420
_RIGHT, _BELOW = 24, 52
_STEPS = 5  # of each axis


class Axes:
    """`across` and `up` name the axes, which reach to the `most` of each at least. `top`: what stays free above."""

    def __init__(self, across: str, up: str, most_across: float, most_up: float, top: int = _RIGHT) -> None:
        self._names = across, up
        self.most_across, self.most_up = _round_up(most_across), _round_up(most_up)
        self.top = top
        self.right, self.bottom = self.x(self.most_across), self.y(0)

    def x(self, value: float) -> float:
        return round(LEFT + value / self.most_across * (WIDTH - LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - _BELOW - value / self.most_up * (HEIGHT - _BELOW - self.top), 1)

    def shapes(self) -> Iterator[Drawn]:
        for step in range(_STEPS + 1):
            across, up = self.most_across * step / _STEPS, self.most_up * step / _STEPS
            yield Stroke(((LEFT, self.y(up)), (self.right, self.y(up))), "#dddddd")
            yield Words((LEFT - 8, self.y(up) + 4), f"{up:.3g}", "end")
            yield Words((self.x(across), self.bottom + 18), f"{across:.3g}", "middle")
        across_name, up_name = self._names
        yield Words(((LEFT + self.right) / 2, HEIGHT - 12), across_name, "middle")
        yield Words((16, (self.top + self.bottom) / 2), up_name, "middle", upwards=True)


def _round_up(value: float) -> float:
    """To an end of the axis whose fifths are easy to read."""
    if value <= 0:
        return 1.0
    unit = 10.0
    while unit < value:
        unit *= 10
    while unit / 10 >= value:
        unit /= 10
    return next(
        unit * part for part in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0) if unit * part >= value
    )
