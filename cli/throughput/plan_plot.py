"""The picture of `shoal plan --plot`: tokens a second by memory, as shapes. Numbers in, shapes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from shoal.partition.amounts import format_bytes, format_rate

from .axes import LEFT, Axes
from .shapes import Area, Dot, Drawn, Point, Stroke, Words

if TYPE_CHECKING:
    from shoal.daemon.throughput.foresight import Curve

_TOP = 96
_NAMES = {"keep": "as stored", "q8": "8 bits", "q4": "4 bits"}
_COLOURS = ("#1667b7", "#2e8b57", "#c8641b")
_GREY, _RED, _BLACK = "#555555", "#aa2222", "#222222"
_LINE, _EACH = 24, 110  # of a legend: its stroke, and how far the next begins
_NEAR = 1.3  # times as much memory as the curves have: the axis goes so far, and no further


class PlottedMachine(NamedTuple):
    name: str
    memory_bytes: float


class ChosenPlan(NamedTuple):
    name: str
    tokens_per_s: float


def plot(
    title: str,
    curves: Sequence[Curve],
    machine: PlottedMachine,
    chosen: ChosenPlan | None,
    target: float | None,
) -> list[Drawn]:
    """The curves are of `machine` alone, with its devices; `chosen` may be a group's plan. What is said of lines and
    dots stands above the axes, where there are none."""
    points = [point for curve in curves for point in curve.points]
    most_bytes = max((it.memory_bytes for it in points), default=machine.memory_bytes)
    if machine.memory_bytes <= _NEAR * most_bytes:
        most_bytes = max(most_bytes, machine.memory_bytes)
    most_speed = max([target or 0.0, chosen.tokens_per_s if chosen else 0.0, *(it.high for it in points)])
    axes = Axes("memory, GB", "tokens/s", most_bytes / 1e9, most_speed, _TOP)
    return [*axes.shapes(), *_drawn(axes, title, curves, machine, chosen, target)]


def _drawn(
    axes: Axes,
    title: str,
    curves: Sequence[Curve],
    machine: PlottedMachine,
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
        yield from _legend(
            number, Stroke(_legend_line(number), colour, 2), _NAMES.get(curve.quant, curve.quant)
        )
    if target is not None:
        y = axes.y(target)
        yield Stroke(((LEFT, y), (axes.right, y)), _RED, dashed=True)
        number = len(curves)
        wanted = Stroke(_legend_line(number), _RED, dashed=True)
        yield from _legend(number, wanted, f"wanted, {format_rate(target)}")
    x, known = axes.x(machine.memory_bytes / 1e9), machine.memory_bytes <= axes.most_across * 1e9
    if known:
        yield Stroke(((x, _TOP), (x, axes.bottom)), _GREY, dashed=True)
    side = "end" if x > (LEFT + axes.right) / 2 else "start"
    said = f"{machine.name}, {format_bytes(machine.memory_bytes)}"
    yield Words((min(x, axes.right), _TOP - 6), said if known else f"{said} (further right)", side, _GREY)
    if chosen is not None:
        for place in ((min(x, axes.right), axes.y(chosen.tokens_per_s)), (LEFT + _LINE / 2, 60)):
            yield Dot(place, 6, "#ffffff")
            yield Dot(place, 5, _BLACK)
        yield Words((LEFT + _LINE + 6, 64), chosen.name)


def _legend_line(number: int) -> tuple[Point, Point]:
    begin = LEFT + _EACH * number
    return (begin, 38), (begin + _LINE, 38)


def _legend(number: int, line: Stroke, name: str) -> Iterator[Drawn]:
    yield line
    yield Words((LEFT + _EACH * number + _LINE + 6, 42), name)
