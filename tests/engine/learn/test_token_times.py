"""How long a token takes, of the latest steps."""

from __future__ import annotations

from shoal.engine.learn.token_times import ENOUGH, LONGEST_CONTEXT, TokenTimes


def test_it_takes_enough_steps_each_time() -> None:
    times = TokenTimes()
    for _ in range(ENOUGH - 1):
        times.note(0.02, 100)
    assert times.take() is None
    times.note(9.0, 100)
    assert times.take() == 0.02
    assert times.take() is None
    for number in range(10 * ENOUGH):
        times.note(float(number), 100)
    assert times.take() == 9 * ENOUGH - 0.5


def test_long_texts_do_not_count() -> None:
    times = TokenTimes()
    for _ in range(2 * ENOUGH):
        times.note(0.05, LONGEST_CONTEXT + 1)
    assert times.take() is None
