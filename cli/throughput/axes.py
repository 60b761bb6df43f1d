"""The axes of a plot, as SVG: both begin at zero. Whoever draws says what is between them. Numbers in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

LEFT = 64
_WIDTH, _HEIGHT, _RIGHT, _BELOW = 720, 420, 24, 52
_STEPS = 5  # of each axis


class Axes:
    """`across` and `up` name the axes, which reach to the `most` of each at least. `top`: what stays free above."""

    def __init__(self, across: str, up: str, most_across: float, most_up: float, top: int = _RIGHT) -> None:
        self._names = across, up
        self.most_across, self.most_up = _round_up(most_across), _round_up(most_up)
        self.top = top
        self.right, self.bottom = self.x(self.most_across), self.y(0)

    def x(self, value: float) -> float:
        return round(LEFT + value / self.most_across * (_WIDTH - LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        return round(_HEIGHT - _BELOW - value / self.most_up * (_HEIGHT - _BELOW - self.top), 1)

    def svg(self, drawn: Iterable[str]) -> str:
        return "\n".join([*self._frame(), *drawn, "</svg>"]) + "\n"

    def _frame(self) -> Iterator[str]:
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
            f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
        )
        yield f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
        for step in range(_STEPS + 1):
            across, up = self.most_across * step / _STEPS, self.most_up * step / _STEPS
            yield f'<path d="M{LEFT} {self.y(up)}H{self.right}" stroke="#dddddd"/>'
            yield f'<text x="{LEFT - 8}" y="{self.y(up) + 4}" text-anchor="end">{up:.3g}</text>'
            yield f'<text x="{self.x(across)}" y="{self.bottom + 18}" text-anchor="middle">{across:.3g}</text>'
        across_name, up_name = self._names
        yield (
            f'<text x="{(LEFT + self.right) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">{across_name}</text>'
        )
        middle = (self.top + self.bottom) / 2
        yield f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{up_name}</text>'


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
