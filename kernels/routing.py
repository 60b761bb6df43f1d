"""Which tokens go to which experts, from the scores of a router.

Knows what is chosen and by which factors, in an order that is the same whoever else is in the batch; not what experts
compute.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.arrays import Floats, Ids
from shoal.kernels.matrix import Routes

Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Routing:
    """Which tokens go to which experts: `used` are those chosen by any token, ascending, `routes` their tokens."""

    used: list[int]
    routes: Routes

    def among(self, experts: Collection[int]) -> Routing:
        """Of these experts only: a run of those in use, as far as they are."""
        if len(experts) >= len(self.used) and all(map(experts.__contains__, self.used)):
            return self
        first, last = bisect_left(self.used, min(experts)), bisect_right(self.used, max(experts))
        starts = self.routes.starts[first : last + 1]
        mine = slice(starts[0], starts[-1])
        routes = Routes(
            tuple(start - starts[0] for start in starts), self.routes.tokens[mine], self.routes.factors[mine]
        )
        return Routing(self.used[first:last], routes)

    @classmethod
    def of(cls, experts: Ids, factors: Floats) -> Routing:
        """Row i of `experts` (T, k) are the choices of token i, with the factors `factors` (T, k)."""
        # Numbers this small are sorted in linear time.
        pairs = np.argsort(experts.astype(np.uint16), axis=None, kind="stable")
        counts = np.bincount(experts.reshape(-1))
        used = np.flatnonzero(counts)
        starts = tuple(accumulate(counts[used].tolist(), initial=0))
        return cls(used.tolist(), Routes(starts, pairs // experts.shape[1], factors.reshape(-1)[pairs]))


def route(scores: Floats, count: int, normalize: bool) -> Routing:
    """Each row of scores (T, n) goes to its `count` best, of equals the lowest, with its softmax as factors: over those
    chosen if `normalize`, else over all."""
    chosen, behind = best(scores, count)
    # In f64, rounded at the end: f32's last bit may depend on how many rows there are.
    odds = np.exp(-behind)
    taken = np.take_along_axis(odds, chosen, -1)  # (T, k)
    factors = taken / (taken if normalize else odds).sum(-1, keepdims=True)
    return Routing.of(chosen, factors.astype(np.float32))


def likeliest(scores: Floats, count: int) -> list[int]:
    """What the rows (T, n) choose, `count` each, by the sum of the odds that they give it, highest first."""
    chosen, behind = best(scores, count)
    odds = np.zeros(scores.shape[1])
    np.add.at(odds, chosen, np.nan_to_num(np.exp(-np.take_along_axis(behind, chosen, -1))))
    first: list[int] = np.argsort(-odds, kind="stable")[: np.count_nonzero(odds)].tolist()
    return first


def best(scores: Floats, count: int) -> tuple[Ids, Doubles]:
    """The `count` best of each row (T, n), of equals the lowest, in no order; and how far all are below the best."""
    with np.errstate(invalid="ignore"):  # rows of NaN, which stay so
        behind = (scores.max(-1, keepdims=True) - scores).astype(np.float64)
    # The bits of what is not negative are ordered as numbers are, and the lowest 29 of an f32 in an f64 are zeros.
    keys = behind.view(np.int64) | np.arange(scores.shape[1])
    return np.partition(keys, count - 1)[:, :count] & (1 << 29) - 1, behind
