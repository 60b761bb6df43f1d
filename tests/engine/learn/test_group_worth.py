"""A group is used for long steps as long as it is faster than rank 0 alone, whatever was predicted."""

from __future__ import annotations

import random
from math import inf

from shoal.engine.learn.group_worth import GroupWorth


def steps(worth: GroupWorth, count: int, together_s: float, alone_s: float) -> int:
    """How many of so many steps of 100 rows, which take so long, the group is used for."""
    used = 0
    for _ in range(count):
        together = worth.pays
        used += together
        worth.note(100, together_s if together else alone_s, together=together)
    return used


def expected(rows: int) -> float:
    return 0.01 * rows


def test_a_group_as_fast_as_predicted_is_used_always() -> None:
    assert steps(GroupWorth(expected), 200, 0.4, 1.0) == 200


def test_a_slow_group_is_tried_now_and_then() -> None:
    worth = GroupWorth(expected)
    assert steps(worth, 1, 3.0, 1.0) == 1
    assert 2 <= steps(worth, 200, 3.0, 1.0) < 10


def test_it_is_used_again_when_it_is_fast_again() -> None:
    worth = GroupWorth(expected)
    steps(worth, 50, 3.0, 1.0)
    assert steps(worth, 200, 0.5, 1.0) > 150


def test_where_all_is_slower_than_expected_one_step_alone_shows_it() -> None:
    assert steps(GroupWorth(expected), 200, 2.0, 4.0) >= 190


def test_a_single_slow_step_does_not_count() -> None:
    worth = GroupWorth(expected)
    steps(worth, 5, 0.5, 1.0)
    worth.note(100, 20.0, together=True)
    assert worth.pays


def test_the_slower_way_costs_little_in_all() -> None:
    """Whatever both take, a twentieth is lost at most."""
    source = random.Random(3)
    for _ in range(200):
        together_s, alone_s = source.uniform(0.3, 3), source.uniform(0.9, 2)
        used = steps(GroupWorth(expected), 300, together_s, alone_s)
        took_s = used * together_s + (300 - used) * alone_s
        assert took_s < 1.05 * 300 * min(together_s, alone_s), (together_s, alone_s, used)


def test_where_rank_0_is_faster_than_expected_that_is_found_out() -> None:
    """Whatever both take, in the long run."""
    for together_s in (0.5, 0.7, 0.9, 1.0, 1.3):
        for alone_s in (0.3, 0.4, 0.6, 0.8):
            used = steps(GroupWorth(expected), 3000, together_s, alone_s)
            took_s = used * together_s + (3000 - used) * alone_s
            assert took_s < 1.06 * 3000 * min(together_s, alone_s), (together_s, alone_s, used)


def test_however_slow_a_group_is_trying_it_costs_no_more() -> None:
    for slower in (3.0, 10.0, 100.0):
        worth = GroupWorth(expected)
        steps(worth, 1, slower, 1.0)
        used = steps(worth, 9000, slower, 1.0)
        assert 1 <= used < 0.03 * 9000 / (slower - 1) + 2


def test_a_step_alone_that_was_held_up_counts_only_for_a_while() -> None:
    worth = GroupWorth(expected)
    steps(worth, 1, 2.0, 1.0)
    worth.note(100, 5.0, together=False)
    assert steps(worth, 300, 2.0, 1.0) < 80


def test_without_an_expectation_the_group_is_trusted() -> None:
    assert steps(GroupWorth(lambda rows: inf), 50, 9.0, 1.0) == 50
