"""What is known of how fast groups were: what counts as new, and when it is forgotten."""

from __future__ import annotations

import threading

from shoal.daemon.cluster.choosing.measured_groups import FORGET_S, MOST_MEASURED, MeasuredGroups

ALONE: frozenset[str] = frozenset()
TWO = frozenset({"a"})


class Clock:
    s = 100.0

    def __call__(self) -> float:
        return self.s


def noted(
    measured: MeasuredGroups, model: str, machines: frozenset[str], token_s: float, times: int = 2
) -> None:
    for _ in range(times):
        measured.note(model, machines, token_s)


def test_small_changes_are_no_news() -> None:
    measured = MeasuredGroups(Clock())
    noted(measured, "m", TWO, 0.03)
    noted(measured, "m", ALONE, 0.05)
    assert measured.changes == 2
    measured.note("m", TWO, 0.0328)
    measured.note("m", TWO, 0.0272)
    assert measured.changes == 2
    measured.note("m", ALONE, 0.04)
    assert measured.changes == 3
    assert measured.token_s("m") == {TWO: 0.03, ALONE: 0.04}
    assert measured.token_s("another") == {}


def test_one_slow_time_is_not_believed() -> None:
    measured = MeasuredGroups(Clock())
    measured.note("m", TWO, 0.09)
    assert (measured.token_s("m"), measured.changes) == ({}, 0)
    measured.note("m", TWO, 0.03)
    assert measured.token_s("m") == {TWO: 0.03}
    for _ in range(2):
        measured.note("m", TWO, 0.09)
        assert measured.token_s("m") == {TWO: 0.03}
    measured.note("m", TWO, 0.08)
    assert measured.token_s("m") == {TWO: 0.08}
    assert measured.changes == 2


def test_what_was_measured_long_ago_is_forgotten_which_is_news() -> None:
    clock = Clock()
    measured = MeasuredGroups(clock)
    noted(measured, "m", TWO, 0.03)
    clock.s += FORGET_S / 2
    noted(measured, "m", ALONE, 0.05)
    assert measured.changes == 2
    clock.s += FORGET_S / 2 + 1
    assert measured.changes == 3
    assert measured.token_s("m") == {ALONE: 0.05}
    measured.note("m", TWO, 0.09)
    assert measured.token_s("m") == {ALONE: 0.05}
    measured.note("m", TWO, 0.09)
    assert measured.token_s("m") == {TWO: 0.09, ALONE: 0.05}


def test_it_is_bounded() -> None:
    measured = MeasuredGroups(Clock())
    for number in range(2 * MOST_MEASURED):
        noted(measured, str(number), ALONE, 1.0)
    assert not measured.token_s(str(MOST_MEASURED - 1))
    assert measured.token_s(str(MOST_MEASURED))


def test_threads_do_not_disturb_each_other() -> None:
    measured = MeasuredGroups()
    ended = threading.Event()

    def note() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            noted(measured, "m", frozenset({str(number % 100)}), 1.0)

    thread = threading.Thread(target=note)
    thread.start()
    try:
        for _ in range(300):
            measured.token_s("m")
    finally:
        ended.set()
        thread.join()
