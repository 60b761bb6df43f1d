"""The picture of plans: what is said stands where no lines are, and the axes end where the data do."""

from __future__ import annotations

import pytest

from shoal.cli.throughput.axes import Axes
from shoal.cli.throughput.plan_plot import ChosenPlan, PlottedMachine, plot
from shoal.cli.throughput.shapes import Drawn, Stroke, Words
from shoal.daemon.throughput.foresight import Curve, CurvePoint

POINTS = [CurvePoint(1e9 * place, 0.1 * place, 0.08 * place, 0.12 * place) for place in range(2, 16)]
CURVES = [Curve("keep", POINTS), Curve("q4", POINTS[:6])]


def said(shapes: list[Drawn]) -> dict[str, Words]:
    return {it.text: it for it in shapes if isinstance(it, Words)}


@pytest.mark.parametrize("memory_bytes", [2e9, 7.5e9, 15e9, 16e9, 64e9])
def test_no_word_lies_on_a_line(memory_bytes: float) -> None:
    chosen = ChosenPlan("through gpu from disk", 0.75)
    shapes = plot("m", CURVES, PlottedMachine("laptop", memory_bytes), chosen, 0.4)
    top = min(y for it in shapes if isinstance(it, Stroke) and len(it.points) > 2 for _, y in it.points)
    words = said(shapes)
    (machine,) = (it for text, it in words.items() if text.startswith("laptop, "))
    for it in (
        machine,
        words["through gpu from disk"],
        words["as stored"],
        words["4 bits"],
        words["wanted, 0.4"],
    ):
        assert it.at[1] < top
    assert ("further right" in machine.text) == (memory_bytes == 64e9)


@pytest.mark.parametrize("most", [0.07, 0.4, 1.0, 3.7, 15.0, 158.0, 2000.0])
def test_axes_end_where_the_data_do_and_have_round_numbers(most: float) -> None:
    axes = Axes("across", "up", most, 1.0)
    assert most < axes.most_across <= 1.05 * most
    numbers = [
        float(it.text)
        for it in axes.shapes()
        if isinstance(it, Words) and it.anchor == "middle" and it.text[0].isdigit()
    ]
    assert 5 <= len(numbers) <= 12
    assert numbers[0] == 0
    assert numbers[-1] > 0.75 * most
