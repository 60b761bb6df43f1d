"""The picture of `shoal plan --plot`: tokens a second by memory, as SVG. Text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from shoal.partition.amounts import format_bytes

if TYPE_CHECKING:
    from shoal.daemon.throughput.foresight import Curve

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BELOW = 64, 24, 52, 52
_STEPS = 5  # of each axis
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
    most_memory = _round_up(max([memory_bytes if chosen else 0.0, *(it.memory_bytes for it in points)]) / 1e9)
    most_speed = _round_up(max([target or 0.0, *(it.high for it in points)]))
    return "\n".join(_lines(title, curves, memory_bytes, chosen, target, most_memory, most_speed)) + "\n"


def _lines(
    title: str,
    curves: Sequence[Curve],
    memory_bytes: float,
    chosen: tuple[float, float] | None,
    target: float | None,
    most_gb: float,
    most_speed: float,
) -> Iterator[str]:
    def x(nbytes: float) -> float:
        return round(_LEFT + nbytes / 1e9 / most_gb * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(speed: float) -> float:
        return round(_HEIGHT - _BELOW - speed / most_speed * (_HEIGHT - _BELOW - _TOP), 1)

    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
    )
    yield f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
    yield f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>'
    bottom, right = y(0), x(most_gb * 1e9)
    for step in range(_STEPS + 1):
        speed, gigabytes = most_speed * step / _STEPS, most_gb * step / _STEPS
        yield f'<path d="M{_LEFT} {y(speed)}H{right}" stroke="#dddddd"/>'
        yield f'<text x="{_LEFT - 8}" y="{y(speed) + 4}" text-anchor="end">{speed:.3g}</text>'
        yield f'<text x="{x(gigabytes * 1e9)}" y="{bottom + 18}" text-anchor="middle">{gigabytes:.3g}</text>'
    yield f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">memory, GB</text>'
    middle = (_TOP + bottom) / 2
    yield f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">tokens/s</text>'
    for number, (curve, colour) in enumerate(zip(curves, _COLOURS, strict=False)):
        if not number:
            there = [f"{x(it.memory_bytes)},{y(it.high)}" for it in curve.points]
            back = [f"{x(it.memory_bytes)},{y(it.low)}" for it in reversed(curve.points)]
            yield f'<polygon points="{" ".join(there + back)}" fill="{colour}" fill-opacity="0.15"/>'
        line = " ".join(f"{x(it.memory_bytes)},{y(it.tokens_per_s)}" for it in curve.points)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
        begin = _LEFT + 150 * number
        yield f'<path d="M{begin} 38h24" stroke="{colour}" stroke-width="2"/>'
        yield f'<text x="{begin + 30}" y="42">{_NAMES.get(curve.quant, curve.quant)}</text>'
    if memory_bytes <= most_gb * 1e9:
        at, side = x(memory_bytes), "end" if memory_bytes > most_gb * 0.6e9 else "start"
        yield f'<path d="M{at} {_TOP}V{bottom}" stroke="#555555" stroke-dasharray="4 3"/>'
        shift = -6 if side == "end" else 6
        said = f"this machine, {format_bytes(memory_bytes)}"
        yield f'<text x="{at + shift}" y="{_TOP + 12}" text-anchor="{side}" fill="#555555">{said}</text>'
    if target is not None:
        yield f'<path d="M{_LEFT} {y(target)}H{right}" stroke="#aa2222" stroke-dasharray="4 3"/>'
        yield f'<text x="{right}" y="{y(target) - 5}" text-anchor="end" fill="#aa2222">wanted</text>'
    if chosen is not None:
        yield f'<circle cx="{x(chosen[0])}" cy="{y(chosen[1])}" r="5" fill="{_COLOURS[0]}" stroke="white"/>'
    yield "</svg>"


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
