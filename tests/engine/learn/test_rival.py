"""The runner-up is tried for some steps, never at anybody's cost, and the better one is kept."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from shoal.engine.learn.rival import Rival

USUAL, OTHER = 8, 4


def run(rival: Rival, seconds: Callable[[int], float], steps: int, **how: bool) -> list[int]:
    """Steps of one row; → the threads of each."""
    found = []
    for _ in range(steps):
        threads = rival.threads(1, **({"prompts": False, "waiting": False} | how))
        rival.note(seconds(threads))
        found.append(threads)
    return found


@pytest.mark.parametrize(
    ("other_s", "kept"), [(0.8, OTHER), (0.96, OTHER), (0.98, USUAL), (1.2, USUAL), (9, USUAL)]
)
def test_the_better_one_is_kept(other_s: float, kept: int) -> None:
    rival = Rival(USUAL, OTHER)
    seconds = {USUAL: 0.01, OTHER: other_s * 0.01}
    found = run(rival, seconds.__getitem__, 200)
    assert set(found[:16]) == {USUAL}
    assert set(found[100:]) == {kept}
    assert f": {kept} compute it" in rival.said
    assert "4 threads took" in rival.said


def test_what_is_hopeless_ends_soon() -> None:
    rival = Rival(USUAL, OTHER)
    assert run(rival, lambda threads: 0.01 if threads == USUAL else 0.05, 400).count(OTHER) <= 5


def test_a_few_slow_steps_decide_nothing() -> None:
    rival, steps = Rival(USUAL, OTHER), iter(range(10_000))
    found = run(
        rival, lambda threads: (0.01 if threads == USUAL else 0.008) * (9 if not next(steps) % 5 else 1), 200
    )
    assert found[-1] == OTHER


@pytest.mark.parametrize("how", [{"prompts": True}, {"waiting": True}])
def test_nothing_is_tried_at_the_cost_of_others(how: dict[str, bool]) -> None:
    rival = Rival(USUAL, OTHER)
    run(rival, lambda threads: 0.01, 16)
    assert set(run(rival, lambda threads: 0.01, 100, **how)) == {USUAL}
    assert not rival.said


def test_steps_of_many_rows_and_of_prompts_keep_all_threads() -> None:
    rival = Rival(USUAL, OTHER)
    run(rival, {USUAL: 0.01, OTHER: 0.005}.__getitem__, 100)
    for rows in (64, 3):  # three rows of four bits take a thread 1.7 times as long as one
        assert {rival.threads(rows, prompts=False, waiting=False) for _ in range(6)} == {USUAL}
    assert [rival.threads(2, prompts=False, waiting=True) for _ in range(6)][-1] == OTHER
    assert rival.threads(2, prompts=True, waiting=False) == USUAL
    assert rival.threads(2, prompts=False, waiting=False) == USUAL  # not for one step alone


def test_it_is_tried_again_when_neighbours_may_have_gone() -> None:
    rival = Rival(USUAL, OTHER)
    run(rival, {USUAL: 0.01, OTHER: 0.02}.__getitem__, 100)
    assert run(rival, {USUAL: 0.01, OTHER: 0.005}.__getitem__, 4300)[-1] == OTHER


@pytest.mark.parametrize(("least", "most"), [(8, 8), (12, 12), (5, 40)])
def test_long_texts_beside_short_ones_decide_nothing(least: int, most: int) -> None:
    """A step of a long text takes twice as long, and half of the threads always a fifth longer."""
    for seed in range(20):
        rival, generator, slower = Rival(USUAL, OTHER), random.Random(seed), 0
        for text in range(100):
            rival.threads(64, prompts=True, waiting=False)
            text_s = generator.choice([0.01, 0.02]) if least < most else 0.01 * (1 + text % 2)
            steps = generator.randint(least, most)
            slower += run(rival, lambda threads, s=text_s: s * (1.2 - 0.2 * (threads == USUAL)), steps).count(
                OTHER
            )  # type: ignore[misc]
        assert slower <= 11 * 8
        assert not rival.said.endswith(f"{OTHER} compute it")


def test_without_a_rival_nothing_changes() -> None:
    assert set(run(Rival(USUAL), lambda threads: 0.01, 300)) == {USUAL}
