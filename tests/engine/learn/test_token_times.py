"""How long a token takes, of the latest steps."""

from __future__ import annotations

from shoal.engine.learn.speeds import Speeds
from shoal.engine.learn.token_times import ENOUGH, TokenTimes


def test_it_takes_enough_steps_each_time() -> None:
    times = TokenTimes()
    for _ in range(ENOUGH - 1):
        times.note(0.02)
    assert times.take() is None
    times.note(9.0)
    assert times.take() == 0.02
    assert times.take() is None
    for number in range(10 * ENOUGH):
        times.note(float(number))
    assert times.take() == 9 * ENOUGH - 0.5


def test_only_steps_with_one_row_count() -> None:
    speeds = Speeds(chunk_tokens=64, row_share=0.1, reads=0)
    for _ in range(ENOUGH):
        speeds.note(1, 1, 0, 0.01)
        speeds.note(2, 2, 0, 0.03)
        speeds.note(1, 0, 1, 0.05)
    assert speeds.token_times.take() == 0.01
