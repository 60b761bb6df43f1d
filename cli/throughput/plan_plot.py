"""The picture of `shoal plan --plot`: tokens a second by memory, as shapes. Numbers in, shapes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from shoal.partition.amounts import format_bytes

from .axes import LEFT, Axes
from .shapes import Area, Dot, Drawn, Point, Stroke, Words

if TYPE_CHECKING:
    from shoal.daemon.throughput.foresight import Curve

_TOP = 52
_NAMES = {"keep": "as stored", "q8": "8 bits", "q4": "4 bits"}
_COLOURS = ("#1667b7", "#2e8b57", "#c8641b")
_GREY, _RED = "#555555", "#aa2222"


class ChosenPlan(NamedTuple):
    """How fast it is, and its name if not this machine's processor alone computes."""

    tokens_per_s: float
    others: str = ""


def plot(
    title: str,
    curves: Sequence[Curve],
    memory_bytes: float,
    chosen: ChosenPlan | None,
    target: float | None,
) -> list[Drawn]:
    """`memory_bytes`: of the machine, whose processor alone the curves are of."""
    points = [point for curve in curves for point in curve.points]
    most_bytes = max([memory_bytes if chosen else 0.0, *(it.memory_bytes for it in points)])
    most_speed = max([target or 0.0, chosen.tokens_per_s if chosen else 0.0, *(it.high for it in points)])
    axes = Axes("memory, GB", "tokens/s", most_bytes / 1e9, most_speed, _TOP)
    return [*axes.shapes(), *_drawn(axes, title, curves, memory_bytes, chosen, target)]


def _drawn(
    axes: Axes,
    title: str,
    curves: Sequence[Curve],
    memory_bytes: float,
    chosen: ChosenPlan | None,
    target: float | None,
) -> Iterator[Drawn]:
    def at(nbytes: float, speed: float) -> Point:
        return axes.x(nbytes / 1e9), axes.y(speed)

    yield Words((LEFT, 20), title, size=14)
    for number, (curve, colour) in enumerate(zip(curves, _COLOURS, strict=False)):
        if not number:
            there = [at(it.memory_bytes, it.high) for it in curve.points]
            back = [at(it.memory_bytes, it.low) for it in reversed(curve.points)]
            yield Area(there + back, colour, 0.15)
        yield Stroke([at(it.memory_bytes, it.tokens_per_s) for it in curve.points], colour, 2)
        begin = LEFT + 150 * number
        yield Stroke(((begin, 38), (begin + 24, 38)), colour, 2)
        yield Words((begin + 30, 42), _NAMES.get(curve.quant, curve.quant))
    if memory_bytes <= axes.most_across * 1e9:
        x = axes.x(memory_bytes / 1e9)
        yield Stroke(((x, _TOP), (x, axes.bottom)), _GREY, dashed=True)
        shift, side = (-6, "end") if memory_bytes > axes.most_across * 0.6e9 else (6, "start")
        yield Words((x + shift, _TOP + 12), f"this machine, {format_bytes(memory_bytes)}", side, _GREY)
    if target is not None:
        y = axes.y(target)
        yield Stroke(((LEFT, y), (axes.right, y)), _RED, dashed=True)
        yield Words((axes.right, y - 5), "wanted", "end", _RED)
    if chosen is not None:
        x, y = at(memory_bytes, chosen.tokens_per_s)
        yield Dot((x, y), 6, "#ffffff")
        yield Dot((x, y), 5, _COLOURS[0])
        if chosen.others:
            shift, side = (-10, "end") if memory_bytes > axes.most_across * 0.6e9 else (10, "start")
            yield Words((x + shift, y + 4), chosen.others, side, _COLOURS[0])
