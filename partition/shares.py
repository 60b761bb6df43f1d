"""How much of a model each rank should have, so that all are ready at the same time. Pure numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALVINGS = 40


def level(costs: Sequence[float], most: Sequence[float]) -> list[float] | None:
    """Shares that sum to 1, of which none exceeds its `most`, with the least max(cost × share); None if `most` does not
    sum to 1."""
    if sum(most) < 1:
        return None
    shares = [0.0] * len(costs)
    open_ranks, left = set(range(len(costs))), 1.0
    while open_ranks:
        pace = left / sum(1 / costs[rank] for rank in open_ranks)
        full = {rank for rank in open_ranks if pace / costs[rank] >= most[rank]}
        for rank in full or open_ranks:
            shares[rank] = most[rank] if full else pace / costs[rank]
        if not full:
            break
        left = max(0.0, left - sum(most[rank] for rank in full))
        open_ranks -= full
    return shares


def level_by(share_within: Sequence[Callable[[float], float]]) -> list[float] | None:
    """Shares that sum to 1, found with the least time in which the ranks can do that much together. Each function gives
    the largest share that its rank does in a time; it never falls. None if no time is long enough."""

    def together(seconds: float) -> float:
        return sum(within(seconds) for within in share_within)

    long = 1e-6
    while together(long) < 1:
        long *= 4
        if long > 1e9:
            return None
    short = long / 4 if long > 1e-6 else 0.0
    for _ in range(_HALVINGS):
        middle = (short + long) / 2
        short, long = (short, middle) if together(middle) >= 1 else (middle, long)
    shares = [within(long) for within in share_within]
    whole = sum(shares)
    return [share / whole for share in shares]
