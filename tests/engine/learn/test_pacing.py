"""How many tokens of prompts go with answers: the first guess, and how it follows what is measured."""

from __future__ import annotations

import math

from shoal.engine.learn.pacing import CROWD_STEP_S, FEW_TOGETHER, MOST_TOGETHER, SLOWDOWN, Pacer
from shoal.engine.learn.step_cost import evenly

SLOW_S = CROWD_STEP_S  # a step of answers alone that takes as long as a step of a crowd may
QUICK_S = CROWD_STEP_S / 100


def test_the_first_budget_is_what_a_row_is_thought_to_cost() -> None:
    """Rows at 15% of a step fill the one and a half steps that may be added with ten; cheap ones are bounded."""
    assert Pacer(64, evenly(0.15)).budget(1, QUICK_S) == int((SLOWDOWN - 1) / 0.15) == 10
    assert Pacer(64, evenly(0.001)).budget(1, QUICK_S) == 64


def test_too_slow_steps_shrink_it_and_fast_ones_grow_it_up_to_the_most() -> None:
    pacer = Pacer(64, evenly(0.15))
    pacer.note(10, 2 * SLOWDOWN * QUICK_S, 1, QUICK_S)
    assert pacer.budget(1, QUICK_S) < 10
    for _ in range(3):
        pacer.rested()
        for _ in range(15):
            pacer.note(pacer.budget(1, QUICK_S), SLOWDOWN / 2 * QUICK_S, 1, QUICK_S)
    assert pacer.budget(1, QUICK_S) == 64
    pacer.note(5, SLOWDOWN / 2 * QUICK_S, 1, QUICK_S)  # few tokens say nothing about more
    assert pacer.budget(1, QUICK_S) == 0  # time for a step without, to measure what they are compared with
    pacer.rested()
    assert pacer.budget(1, QUICK_S) == 64


def test_each_of_several_prompts_may_add_as_much_as_one_alone() -> None:
    pacer = Pacer(64, evenly(0.15))
    assert pacer.budget(3, SLOW_S) == 3 * pacer.budget(1, SLOW_S) == 30
    pacer.note(30, (1 + 3 * (SLOWDOWN - 1)) * SLOW_S, 3, SLOW_S)  # as slow as three may make it
    assert pacer.budget(1, SLOW_S) == 10
    pacer.note(30, (2 + 6 * (SLOWDOWN - 1)) * SLOW_S, 3, SLOW_S)
    assert pacer.budget(1, SLOW_S) < 10
    assert Pacer(64, evenly(0.001)).budget(3, SLOW_S) == 64


def test_many_prompts_may_add_more_where_nobody_waits_long_for_a_token() -> None:
    pacer = Pacer(512, evenly(0.15))
    assert pacer.budget(100, SLOW_S) == FEW_TOGETHER * 10
    assert pacer.budget(100, QUICK_S) == FEW_TOGETHER * 10  # as long as nothing is measured
    as_thought(pacer, QUICK_S)
    assert pacer.budget(9, QUICK_S) == 90
    assert pacer.budget(100, QUICK_S) == MOST_TOGETHER * 10
    pacer = Pacer(512, evenly(0.15))
    alone_s = CROWD_STEP_S / (1 + 8 * (SLOWDOWN - 1))  # with eight prompts a step takes as long as it may
    as_thought(pacer, alone_s)
    assert pacer.budget(100, alone_s) in (79, 80)  # it rounds down
    pacer.note(80, CROWD_STEP_S, 100, alone_s)
    assert pacer.budget(1, alone_s) in (9, 10)
    pacer.note(80, 1.5 * CROWD_STEP_S, 100, alone_s)
    assert pacer.budget(1, alone_s) < 9


def as_thought(pacer: Pacer, alone_s: float) -> None:
    """A first step of four prompts takes as long as they may make it."""
    pacer.note(FEW_TOGETHER * 10, (1 + FEW_TOGETHER * (SLOWDOWN - 1)) * alone_s, FEW_TOGETHER, alone_s)


def test_a_guess_that_was_much_too_low_makes_no_step_long() -> None:
    """Tokens take almost seven times what they are thought to."""
    pacer, together = Pacer(512, evenly(0.15)), MOST_TOGETHER
    allowed_s = (1 + together * (SLOWDOWN - 1)) * QUICK_S
    for step in range(8):
        tokens = pacer.budget(together, QUICK_S)
        seconds = (1 + tokens) * QUICK_S
        assert seconds < (2 if step == 0 else 1.01) * allowed_s
        pacer.note(tokens, seconds, together, QUICK_S)
    assert seconds > 0.8 * allowed_s


def test_a_short_prompt_says_nothing_about_long_ones() -> None:
    pacer = Pacer(512, evenly(0.15))
    for seconds in (QUICK_S, SLOWDOWN * QUICK_S):
        pacer.note(3, seconds, 1, QUICK_S)
        assert pacer.budget(1, QUICK_S) == 10
    pacer.note(3, 2 * SLOWDOWN * QUICK_S, 1, QUICK_S)  # but that they are slow
    assert pacer.budget(1, QUICK_S) < 10


def test_where_nobody_waits_prompts_are_not_held_back() -> None:
    pacer = Pacer(64, evenly(0.15), slowdown=math.inf)
    for slowdown in (1.0, 50.0):
        pacer.note(64, slowdown * QUICK_S, 1, QUICK_S)
        assert pacer.budget(1, QUICK_S) == 64
