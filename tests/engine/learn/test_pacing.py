"""How many tokens of prompts go with answers: the first guess, and how it follows what is measured."""

from __future__ import annotations

import math

from shoal.engine.learn.pacing import MOST_TOGETHER, SLOWDOWN, Pacer
from shoal.engine.learn.step_cost import evenly


def test_the_first_budget_is_what_a_row_is_thought_to_cost() -> None:
    """Rows at 15% of a step fill the one and a half steps that may be added with ten; cheap ones are bounded."""
    assert Pacer(64, evenly(0.15)).budget() == int((SLOWDOWN - 1) / 0.15) == 10
    assert Pacer(64, evenly(0.001)).budget() == 64


def test_too_slow_steps_shrink_it_and_fast_ones_grow_it_up_to_the_most() -> None:
    pacer = Pacer(64, evenly(0.15))
    pacer.note(10, 2 * SLOWDOWN)
    assert pacer.budget() < 10
    for _ in range(3):
        pacer.rested()
        for _ in range(15):
            pacer.note(pacer.budget(), SLOWDOWN / 2)
    assert pacer.budget() == 64
    pacer.note(5, SLOWDOWN / 2)  # few tokens say nothing about more
    assert pacer.budget() == 0  # time for a step without, to measure what they are compared with
    pacer.rested()
    assert pacer.budget() == 64


def test_each_of_several_prompts_may_add_as_much_as_one_alone() -> None:
    pacer = Pacer(64, evenly(0.15))
    assert pacer.budget(3) == 3 * pacer.budget() == 30
    assert pacer.budget(100) == pacer.budget(MOST_TOGETHER)
    pacer.note(30, 1 + 3 * (SLOWDOWN - 1), prompts=3)  # as slow as three may make it
    assert pacer.budget() == 10
    pacer.note(30, 2 + 6 * (SLOWDOWN - 1), prompts=3)
    assert pacer.budget() < 10
    assert Pacer(64, evenly(0.001)).budget(3) == 64


def test_where_nobody_waits_prompts_are_not_held_back() -> None:
    pacer = Pacer(64, evenly(0.15), slowdown=math.inf)
    for slowdown in (1.0, 50.0):
        pacer.note(64, slowdown)
        assert pacer.budget() == 64
