"""Guessing ahead: what is found in the text, what a step costs, and how deep a guess pays."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.guess.lookup import LONGEST, SHORTEST, PromptLookup
from shoal.engine.guess.speculation import Acceptance, Guesser, depths, model_depth
from shoal.engine.learn.step_cost import StepCost, evenly

texts = st.lists(st.integers(0, 3), max_size=60)


def agreement(tokens: list[int], place: int) -> int:
    length = 0
    while length < min(place, LONGEST) and tokens[place - 1 - length] == tokens[-1 - length]:
        length += 1
    return length


def test_what_followed_the_longest_agreement_is_proposed() -> None:
    draft = PromptLookup([1, 2, 3, 7, 8, 0, 2, 3, 9, 9, 5, 1, 2, 3]).propose(2)
    assert draft.tokens == (7, 8)
    assert draft.grades == (3, 4)


def test_of_equal_agreements_the_most_recent_counts() -> None:
    assert PromptLookup([1, 2, 5, 1, 2, 6, 1, 2]).propose(1).tokens == (6,)


def test_a_loop_goes_on() -> None:
    draft = PromptLookup([9, 1, 2, 3, 1, 2, 3, 1, 2]).propose(7)
    assert draft.tokens == (3, 1, 2, 3, 1, 2, 3)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], [1, 1, 2, 3], [5, 2, 3, 2]])
def test_nothing_new_is_made_up(tokens: list[int]) -> None:
    assert PromptLookup(tokens).propose(4).tokens == ()


@settings(deadline=None, max_examples=150)
@given(texts, st.integers(0, 9))
def test_a_proposal_continues_an_earlier_place_and_misses_none(tokens: list[int], limit: int) -> None:
    """Where the text has fewer places than are compared, the best agreement is found, and what followed it repeats."""
    tokens = tokens[:18]
    draft = PromptLookup(tokens).propose(limit)
    best = max((agreement(tokens, place) for place in range(SHORTEST, len(tokens))), default=0)
    if best < SHORTEST or limit == 0:
        assert draft.tokens == ()
        return
    assert len(draft.tokens) == limit
    assert draft.grades == tuple(min(best + i, LONGEST) for i in range(limit))
    places = [place for place in range(SHORTEST, len(tokens)) if agreement(tokens, place) == best]
    longer = tokens[:]
    for token in draft.tokens:
        longer.append(longer[max(places) + len(longer) - len(tokens)])
        assert token == longer[-1]


@settings(deadline=None, max_examples=60)
@given(texts, st.lists(st.integers(1, 5), max_size=30))
def test_an_index_that_grows_equals_a_fresh_one(tokens: list[int], growth: list[int]) -> None:
    grown: list[int] = []
    lookup = PromptLookup(grown)
    for count in growth:
        grown += tokens[len(grown) : len(grown) + count]
        assert lookup.propose(4) == PromptLookup(grown[:]).propose(4)


def test_acceptance_follows_what_happened_lately() -> None:
    acceptance = Acceptance(lambda grade: (grade - 1) / (grade + 1))
    assert [round(acceptance.chance(grade), 2) for grade in (2, 4, 16)] == [0.33, 0.6, 0.88]
    for _ in range(30):
        acceptance.note(2, True)
    assert acceptance.chance(2) > 0.85
    for _ in range(30):
        acceptance.note(2, False)
    assert acceptance.chance(2) < 0.3
    assert acceptance.chance(3) == pytest.approx(0.5)


def test_guesses_that_were_not_sent_teach_too() -> None:
    guesser = Guesser([1, 2, 3, 0, 1, 2])
    first = guesser.guess(1)
    guesser.score([3])
    second = guesser.guess(1)
    guesser.score([9])
    guesser.score([9])  # without a guess there is nothing to learn
    third = guesser.guess(1)
    assert first < second > third


def linear(base: float, row: float) -> StepCost:
    cost = StepCost()
    for _ in range(200):
        for rows in (1, 2, 4, 8, 16, 32):
            cost.note(rows, base + row * rows)
    return cost


def test_the_cost_of_rows_is_learnt() -> None:
    cost = linear(0.01, 0.002)
    for rows in (1, 2, 3, 6, 11, 32, 60):  # the last beyond what was measured
        assert cost.seconds(rows) == pytest.approx(0.01 + 0.002 * rows, rel=0.02)


def test_a_change_of_pace_keeps_the_shape() -> None:
    cost = linear(0.01, 0.002)
    for _ in range(40):
        cost.note(1, 0.024)  # everything takes twice as long; only single rows are seen
    assert cost.seconds(16) / cost.seconds(1) == pytest.approx(0.042 / 0.012, rel=0.02)
    assert cost.seconds(16) == pytest.approx(0.084, rel=0.05)


def test_one_step_that_was_held_up_is_not_believed() -> None:
    cost = linear(0.01, 0.002)
    cost.note(8, 60.0)
    assert cost.seconds(8) < 2 * 0.026


def test_noise_is_averaged_out() -> None:
    source, cost = random.Random(5), StepCost()
    for _ in range(600):
        rows = source.choice((1, 1, 3, 5, 9))
        cost.note(rows, (1 + 0.1 * (rows - 1)) * math.exp(source.gauss(0, 0.25)))
    assert cost.seconds(9) / cost.seconds(1) == pytest.approx(1.8, rel=0.25)


def test_a_slow_first_step_makes_no_step_take_less_than_nothing() -> None:
    cost = StepCost()
    for rows in (1, 1, 1, 2, 2):
        cost.note(rows, 1.0 / rows)  # the machine was busy at first
    assert cost.seconds(12) >= cost.seconds(2) > 0
    cost.note(12, 0.5)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-4, 100.0)), max_size=60))
def test_every_step_is_expected_to_take_time(steps: list[tuple[int, float]]) -> None:
    cost = StepCost()
    for rows, seconds in steps:
        cost.note(rows, seconds)
        assert all(0 < cost.seconds(rows) < math.inf for rows in (1, 2, 5, 12, 16, 100, 3000, 1 << 20))


def test_extremes_stay_finite() -> None:
    cost = StepCost()
    for rows, seconds in ((1, 0.0), (1 << 20, 1e6), (7, 0.0), (65536, 0.0), (65535, 1e9)):
        cost.note(rows, seconds)
        assert 0 < cost.seconds(rows) < math.inf


def goodput(counts: tuple[int, ...], chances: list[list[float]], cost: StepCost, before_s: float) -> float:
    gained = sum(sum(row[:count]) for row, count in zip(chances, counts, strict=True))
    return (len(chances) + gained) / (before_s + cost.seconds(len(chances) + sum(counts)))


@st.composite
def falling(draw: st.DrawFn) -> list[float]:
    steps = draw(st.lists(st.floats(0.05, 0.99), max_size=4))
    return [math.prod(steps[: i + 1]) for i in range(len(steps))]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(falling(), min_size=1, max_size=3),
    st.integers(0, 8),
    st.sampled_from([0.01, 0.1, 0.2, 0.6, 1.5]),
    st.sampled_from([0.0, 0.5]),
)
def test_depths_are_the_best_of_all(
    chances: list[list[float]], spare: int, row_share: float, before_s: float
) -> None:
    cost = StepCost(evenly(row_share))
    chosen, found = depths(chances, spare, cost, before_s)
    assert sum(chosen) <= spare
    every: list[tuple[int, ...]] = [()]
    for row in chances:
        every = [(*counts, depth) for counts in every for depth in range(len(row) + 1)]
    best = max(goodput(counts, chances, cost, before_s) for counts in every if sum(counts) <= spare)
    assert found == pytest.approx(best)
    assert goodput(tuple(chosen), chances, cost, before_s) == pytest.approx(best)


def test_dear_rows_buy_nothing_and_cheap_ones_all() -> None:
    row = [0.9**i for i in range(1, 33)]
    assert depths([row], 99, StepCost(evenly(1.0)))[0] == [0]
    assert depths([row], 99, StepCost(evenly(0.001)))[0] == [32]
    found = [depths([row], 99, StepCost(evenly(share)))[0][0] for share in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)]
    assert all(deeper >= less for deeper, less in pairwise(found))


def simulate(text: list[int], prompt: int, row_share: float) -> tuple[int, float]:
    """How many steps it takes to write `text` after its first `prompt` tokens, and what their rows cost."""
    cost, true = StepCost(), StepCost(evenly(row_share))
    tokens = text[:prompt]
    guesser = Guesser(tokens)
    steps, spent = 0, 0.0
    while len(tokens) < len(text):
        chances = guesser.guess(min(32, len(text) - len(tokens) - 1))
        depth = depths([chances], 32, cost)[0][0]
        truth = text[len(tokens) :]
        right = 0
        while right < depth and guesser.first(depth)[right] == truth[right]:
            right += 1
        guesser.score(truth[: right + 1])
        tokens += truth[: right + 1]
        cost.note(1 + depth, true.seconds(1 + depth))
        spent += true.seconds(1 + depth)
        steps += 1
    return steps, spent


def test_repetition_is_found_out_within_a_few_dozen_tokens() -> None:
    source = random.Random(1)
    phrase = [source.randrange(1000) for _ in range(40)]
    steps, spent = simulate([*phrase, *phrase, *phrase], 40, 0.1)
    assert steps < 30
    assert spent < 45


@pytest.mark.parametrize("row_share", [0.1, 0.3, 1.0])
def test_guessing_costs_next_to_nothing_where_it_is_always_wrong(row_share: float) -> None:
    """Pairs of tokens return all the time, but never with the same token after them."""
    text = [token for i in range(300) for token in (1, 2, 10 + i)]
    _, spent = simulate(text, 30, row_share)
    assert spent < 1.03 * (len(text) - 30)


def test_a_further_round_of_a_draft_model_must_pay_for_itself_and_its_rows() -> None:
    """The first row costs 1, each further one 0.15. If a round costs this much, the model is not asked at all."""
    cost, draft_cost = StepCost(), StepCost()
    draft_cost.note(2, 100.0)
    guessers = [Guesser([1, 2, 3]), Guesser([4, 5, 6])]
    depth, least = model_depth(guessers, 8, cost, draft_cost)
    assert depth == 0
    assert least == pytest.approx(2 / 1.15 * (100.0 + 2 * 0.15))
