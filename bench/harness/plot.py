"""Figures that were measured at several sizes, as a small SVG: the values, and the line that they should lie on.

Pure: figures in, text out. Bars span the least and the most of the rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from harness.figures import Figure

from shoal.cli.throughput import shapes
from shoal.cli.throughput.axes import HEIGHT, WIDTH, Axes
from shoal.cli.throughput.shapes import Dot, Drawn, Stroke


def svg(figures: Sequence[Figure], across: str, up: str) -> str:
    """The SVG of figures with `at` set. All have values of shoal and of one other, which is the line. "" if there are
    none."""
    points = sorted((figure for figure in figures if figure.at), key=lambda figure: figure.at)
    if not points:
        return ""
    most = max(max(values) for point in points for values in point.values.values())
    axes = Axes(across, up, points[-1].at, most)
    return shapes.svg(WIDTH, HEIGHT, [*axes.shapes(), *_drawn(axes, points)]).decode()


def _drawn(axes: Axes, points: Sequence[Figure]) -> Iterator[Drawn]:
    x, y = axes.x, axes.y
    floor = [(x(point.at), y(median(point.values[point.peer() or ""]))) for point in points]
    yield Stroke(floor, "#888888", dashed=True)
    for point in points:
        ours = point.values["shoal"]
        yield Stroke([(x(point.at), y(end(ours))) for end in (min, max)], "#0066cc")
        yield Dot((x(point.at), y(median(ours))), 3.5, "#0066cc")
