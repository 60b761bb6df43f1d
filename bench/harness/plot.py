"""Figures that were measured at several sizes, as a small SVG: the values, and the line that they should lie on.

Pure: figures in, text out. Bars span the least and the most of the rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from harness.figures import Figure

from shoal.cli.throughput.axes import Axes


def svg(figures: Sequence[Figure], across: str, up: str) -> str:
    """The SVG of figures with `at` set. All have values of shoal and of one other, which is the line. "" if there are
    none."""
    points = sorted((figure for figure in figures if figure.at), key=lambda figure: figure.at)
    if not points:
        return ""
    most = max(max(values) for point in points for values in point.values.values())
    axes = Axes(across, up, points[-1].at, most)
    return axes.svg(_drawn(axes, points))


def _drawn(axes: Axes, points: Sequence[Figure]) -> Iterator[str]:
    x, y = axes.x, axes.y
    line = " ".join(f"{x(point.at)},{y(median(point.values[point.peer() or '']))}" for point in points)
    yield f'<polyline points="{line}" fill="none" stroke="#888" stroke-dasharray="4 3"/>'
    for point in points:
        ours = point.values["shoal"]
        yield f'<path d="M{x(point.at)} {y(min(ours))}V{y(max(ours))}" stroke="#06c"/>'
        yield f'<circle cx="{x(point.at)}" cy="{y(median(ours))}" r="3.5" fill="#06c"/>'
