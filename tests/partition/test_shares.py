"""Shares that make everybody ready at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.partition.shares import level, level_by

COSTS = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0, 1)), min_size=1, max_size=16)


def test_shares_follow_speed() -> None:
    assert level([1, 1, 2], [1, 1, 1]) == pytest.approx([0.4, 0.4, 0.2])
    assert level([1, 1, 2], [0.2, 1, 1]) == pytest.approx([0.2, 0.8 * 2 / 3, 0.8 / 3])
    assert level([1, 1], [0.4, 0.5]) is None
    assert level([5], [1]) == [1]


@given(COSTS)
def test_shares_sum_to_one_within_their_limits(ranks: list[tuple[float, float]]) -> None:
    costs, most = zip(*ranks, strict=True)
    shares = level(costs, most)
    if shares is None:
        assert sum(most) < 1
        return
    assert sum(shares) == pytest.approx(1)
    assert all(share <= limit + 1e-9 for share, limit in zip(shares, most, strict=True))
    slowest = max(cost * share for cost, share in zip(costs, shares, strict=True))
    for cost, share, limit in zip(costs, shares, most, strict=True):
        assert share == pytest.approx(limit) or cost * share == pytest.approx(slowest, rel=1e-6)


def test_shares_by_time() -> None:
    fast, slow = (lambda pace: lambda seconds: min(1.0, pace * seconds))(3.0), lambda seconds: seconds
    assert level_by([fast, slow]) == pytest.approx([0.75, 0.25])
    assert level_by([lambda seconds: 0.3, lambda seconds: 0.3]) is None
