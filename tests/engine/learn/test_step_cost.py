"""Costs that were expected before any was measured."""

from __future__ import annotations

import pytest

from shoal.engine.learn.step_cost import StepCost


@pytest.mark.parametrize("unit_s", [1e-4, 7e-3, 1.0, 30.0])
def test_the_shape_that_was_expected_stays_whatever_the_pace_is(unit_s: float) -> None:
    cost = StepCost(lambda rows: unit_s * (1 + 0.1 * (rows - 1)))
    assert cost.seconds(5) == pytest.approx(1.4 * unit_s)
    for _ in range(50):
        cost.note(1, 0.02)
    assert cost.seconds(1) == pytest.approx(0.02)
    assert cost.seconds(5) == pytest.approx(0.028, rel=0.01)
