"""Guesses of lengths and peaks, and whose turn it is, against plain counting."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.learn.fairness import GENERATED_COST, REMEMBERED, TokenCounters
from shoal.engine.learn.forecast import AnswerLengths, Growth, peak_tokens

COUNT = st.integers(0, 60)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(COUNT, COUNT), min_size=1, max_size=8))
def test_the_peak_is_that_of_playing_it_through(sequences: list[tuple[int, int]]) -> None:
    played = max(
        sum(tokens + step for tokens, left in sequences if left >= step)
        for step in range(max(left for _, left in sequences) + 1)
    )
    assert peak_tokens(Growth(tokens, left) for tokens, left in sequences) == played


def test_an_answer_is_expected_to_be_like_those_that_came_as_far() -> None:
    lengths = AnswerLengths()
    for _ in range(200):
        lengths.note(10)
        lengths.note(500)
    assert lengths.expected(0) == 500
    assert lengths.expected(10) == 500
    for _ in range(500):
        lengths.note(10)
    assert lengths.expected(0) == 10  # the long ones are forgotten
    assert 100 < lengths.expected(100) <= 200  # beyond all that is known


@settings(deadline=None, max_examples=60)
@given(st.lists(COUNT, max_size=600), COUNT)
def test_expected_is_always_longer(seen: list[int], so_far: int) -> None:
    lengths = AnswerLengths()
    for length in seen:
        lengths.note(length)
    assert lengths.expected(so_far) > so_far


def test_a_newcomer_starts_with_the_least_served_and_idlers_save_nothing() -> None:
    counters = TokenCounters()
    counters.enter("a")
    counters.enter("b")
    counters.charge("a", prompt_tokens=10, generated_tokens=5)
    counters.charge("b", prompt_tokens=7, generated_tokens=0)
    assert counters.given("a") == 10 + 5 * GENERATED_COST
    counters.enter("c")
    assert counters.given("c") == counters.given("b") == 7
    counters.enter("b")
    counters.leave("b")
    assert counters.given("b") == 7  # it still has a request
    counters.leave("b")
    counters.leave("c")
    counters.enter("b")
    assert counters.given("b") == counters.given("a")


def test_what_a_client_was_given_counts_until_nobody_is_left() -> None:
    """Asking again and again is no better than asking for all at once."""
    counters = TokenCounters()
    for client in ("a", "b"):
        counters.enter(client)
    counters.charge("a", 100, 0)
    counters.leave("a")
    counters.charge("b", 30, 0)
    counters.enter("a")
    assert (counters.given("a"), counters.given("b")) == (100, 30)
    for passing in range(2 * REMEMBERED):
        counters.enter(str(passing))
        counters.leave(str(passing))
    assert len(counters._given) == REMEMBERED + 2
    counters.leave("a")
    counters.leave("b")
    counters.enter("a")
    assert counters.given("a") == 0


def test_of_those_without_requests_who_left_longest_ago_is_forgotten_first() -> None:
    counters = TokenCounters()
    counters.enter("stays")
    counters.charge("stays", 1, 0)
    names = [str(number) for number in range(REMEMBERED + 1)]
    for tokens, name in enumerate(names, 5):
        counters.enter(name)
        counters.charge(name, tokens, 0)
        counters.leave(name)
    assert list(counters._given) == ["stays", *names[1:]]
    counters.enter(names[0])  # as a newcomer, at the level of the least served
    assert counters.given(names[0]) == counters.given("stays") == 1
    counters.enter(names[1])
    assert counters.given(names[1]) > 1
