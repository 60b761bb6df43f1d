"""The picture of `shoal plan --plot`: tokens a second by memory, as SVG. Text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from shoal.partition.amounts import format_bytes

from .axes import LEFT, Axes

if TYPE_CHECKING:
    from shoal.daemon.throughput.foresight import Curve

_TOP = 52
_NAMES = {"keep": "as stored", "q8": "8 bits", "q4": "4 bits"}
_COLOURS = ("#1667b7", "#2e8b57", "#c8641b")


def plot(
    title: str,
    curves: Sequence[Curve],
    memory_bytes: float,
    chosen: tuple[float, float] | None,
    target: float | None,
) -> str:
    """`memory_bytes`: of the machine; `chosen`: memory and speed of the plan that was chosen."""
    points = [point for curve in curves for point in curve.points]
    most_bytes = max([memory_bytes if chosen else 0.0, *(it.memory_bytes for it in points)])
    most_speed = max([target or 0.0, *(it.high for it in points)])
    axes = Axes("memory, GB", "tokens/s", most_bytes / 1e9, most_speed, _TOP)
    return axes.svg(_drawn(axes, title, curves, memory_bytes, chosen, target))


def _drawn(
    axes: Axes,
    title: str,
    curves: Sequence[Curve],
    memory_bytes: float,
    chosen: tuple[float, float] | None,
    target: float | None,
) -> Iterator[str]:
    def x(nbytes: float) -> float:
        return axes.x(nbytes / 1e9)

    y, bottom, right = axes.y, axes.bottom, axes.right
    yield f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>'
    for number, (curve, colour) in enumerate(zip(curves, _COLOURS, strict=False)):
        if not number:
            there = [f"{x(it.memory_bytes)},{y(it.high)}" for it in curve.points]
            back = [f"{x(it.memory_bytes)},{y(it.low)}" for it in reversed(curve.points)]
            yield f'<polygon points="{" ".join(there + back)}" fill="{colour}" fill-opacity="0.15"/>'
        line = " ".join(f"{x(it.memory_bytes)},{y(it.tokens_per_s)}" for it in curve.points)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
        begin = LEFT + 150 * number
        yield f'<path d="M{begin} 38h24" stroke="{colour}" stroke-width="2"/>'
        yield f'<text x="{begin + 30}" y="42">{_NAMES.get(curve.quant, curve.quant)}</text>'
    if memory_bytes <= axes.most_across * 1e9:
        at, side = x(memory_bytes), "end" if memory_bytes > axes.most_across * 0.6e9 else "start"
        yield f'<path d="M{at} {_TOP}V{bottom}" stroke="#555555" stroke-dasharray="4 3"/>'
        shift = -6 if side == "end" else 6
        said = f"this machine, {format_bytes(memory_bytes)}"
        yield f'<text x="{at + shift}" y="{_TOP + 12}" text-anchor="{side}" fill="#555555">{said}</text>'
    if target is not None:
        yield f'<path d="M{LEFT} {y(target)}H{right}" stroke="#aa2222" stroke-dasharray="4 3"/>'
        yield f'<text x="{right}" y="{y(target) - 5}" text-anchor="end" fill="#aa2222">wanted</text>'
    if chosen is not None:
        yield f'<circle cx="{x(chosen[0])}" cy="{y(chosen[1])}" r="5" fill="{_COLOURS[0]}" stroke="white"/>'
