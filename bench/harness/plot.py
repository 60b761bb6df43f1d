"""Figures that were measured at several sizes, as a small SVG: the values, and the line that they should lie on.

Pure: figures in, text out. Axes begin at zero; bars span the least and the most of the rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from harness.figures import Figure

WIDTH, HEIGHT, LEFT, BELOW, ROOM = 560, 300, 52, 40, 16
STEPS = 5  # of each axis


def svg(figures: Sequence[Figure], across: str, up: str) -> str:
    """The SVG of figures with `at` set. All have values of shoal and of one other, which is the line. "" if there are
    none."""
    points = sorted((figure for figure in figures if figure.at), key=lambda figure: figure.at)
    if not points:
        return ""
    most = max(max(values) for point in points for values in point.values.values())
    return "\n".join(_lines(points, _round_up(points[-1].at), _round_up(most), across, up)) + "\n"


def _lines(points: Sequence[Figure], width: float, height: float, across: str, up: str) -> Iterator[str]:
    def x(value: float) -> float:
        return round(LEFT + value / width * (WIDTH - LEFT - ROOM), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BELOW - value / height * (HEIGHT - BELOW - ROOM), 1)

    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11">'
    )
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    for step in range(STEPS + 1):
        at, value = width * step / STEPS, height * step / STEPS
        yield f'<path d="M{LEFT} {y(value)}H{x(width)}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:.3g}</text>'
        yield f'<text x="{x(at)}" y="{HEIGHT - BELOW + 16}" text-anchor="middle">{at:.3g}</text>'
    yield f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{across}</text>'
    yield f'<text transform="translate(12 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{up}</text>'
    line = " ".join(f"{x(point.at)},{y(median(point.values[point.peer() or '']))}" for point in points)
    yield f'<polyline points="{line}" fill="none" stroke="#888" stroke-dasharray="4 3"/>'
    for point in points:
        ours = point.values["shoal"]
        yield f'<path d="M{x(point.at)} {y(min(ours))}V{y(max(ours))}" stroke="#06c"/>'
        yield f'<circle cx="{x(point.at)}" cy="{y(median(ours))}" r="3.5" fill="#06c"/>'
    yield "</svg>"


def _round_up(value: float) -> float:
    """Rounds up to an end of the axis whose fifths are easy to read."""
    unit = 10.0 ** len(str(int(value))) if value >= 1 else 1.0
    return next(unit * part for part in (0.1, 0.2, 0.25, 0.5, 0.75, 1.0) if unit * part >= value)
