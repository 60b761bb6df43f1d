"""What steps of a loaded model take by their rows: the first values of what running then teaches. Pure."""

from __future__ import annotations

from collections.abc import Callable

from ..plan import Plan
from .laws import interpolated

_ROWS = (1, 2, 3, 4, 6, 8, 16, 64, 256)  # that are worked out; the others lie between
_BEFORE = 512  # tokens, if the context is as long


def step_curve(plan: Plan, step_s: Callable[[int, float], float]) -> Callable[[int], float]:
    """Rows → seconds. `step_s`: of a step, by its rows and the tokens before them.
    Beyond the last point each further row takes as long as one of the last did."""
    before = min(_BEFORE, plan.context_tokens // 2)
    seconds = tuple(step_s(rows, before) for rows in _ROWS)

    def expected(rows: int) -> float:
        if rows > _ROWS[-1]:
            return seconds[-1] * rows / _ROWS[-1]
        return interpolated(rows, _ROWS, seconds)

    return expected
