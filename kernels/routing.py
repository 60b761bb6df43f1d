"""Which tokens go to which experts, by the scores of a router.

Knows which experts a token gets and with which factors; neither depends on the rest of the batch. Does not know what
experts compute.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.arrays import Floats, Ids
from shoal.kernels.matrix import Routes

Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Routing:
    """Which tokens go to which experts: `used` are the experts that tokens chose, ascending, `routes` their tokens."""

    used: list[int]
    routes: Routes

    def among(self, experts: Collection[int]) -> Routing:
        """The routing to these experts only; a view, if those of them that are in use follow each other in `used`."""
        if len(experts) >= len(self.used) and all(map(experts.__contains__, self.used)):
            return self
        first, last = bisect_left(self.used, min(experts)), bisect_right(self.used, max(experts))
        used, starts = self.used[first:last], self.routes.starts[first : last + 1]
        mine: slice | Ids = slice(starts[0], starts[-1])
        if not all(map(experts.__contains__, used)):
            runs = [its for its in zip(used, pairwise(starts), strict=True) if its[0] in experts]
            used = [expert for expert, _ in runs]
            starts = tuple(accumulate((stop - start for _, (start, stop) in runs), initial=0))
            mine = np.concatenate([np.arange(start, stop) for _, (start, stop) in runs] or [np.arange(0)])
        routes = Routes(
            tuple(start - starts[0] for start in starts), self.routes.tokens[mine], self.routes.factors[mine]
        )
        return Routing(used, routes)

    @classmethod
    def of(cls, experts: Ids, factors: Floats) -> Routing:
        """Row i of `experts` (T, k) has the choices of token i, row i of `factors` (T, k) their factors."""
        # NumPy sorts numbers of 16 bits in linear time.
        pairs = np.argsort(experts.astype(np.uint16), axis=None, kind="stable")
        counts = np.bincount(experts.reshape(-1))
        used = np.flatnonzero(counts)
        starts = tuple(accumulate(counts[used].tolist(), initial=0))
        return cls(used.tolist(), Routes(starts, pairs // experts.shape[1], factors.reshape(-1)[pairs]))


def route(scores: Floats, count: int, normalize: bool) -> Routing:
    """Each row of scores (T, n) goes to its `count` best experts; among equals the lowest are chosen. The factors are
    the row's softmax, over the chosen ones if `normalize`, else over all."""
    chosen, behind = best(scores, count)
    # In f64, rounded at the end: f32's last bit may depend on how many rows there are.
    odds = np.exp(-behind)
    taken = np.take_along_axis(odds, chosen, -1)  # (T, k)
    factors = taken / (taken if normalize else odds).sum(-1, keepdims=True)
    return Routing.of(chosen, factors.astype(np.float32))


def likeliest(scores: Floats, count: int) -> list[int]:
    """The experts that rows (T, n) choose, `count` each, sorted by the sum of the odds that rows give them, the highest
    first."""
    chosen, behind = best(scores, count)
    odds = np.zeros(scores.shape[1])
    np.add.at(odds, chosen, np.nan_to_num(np.exp(-np.take_along_axis(behind, chosen, -1))))
    first: list[int] = np.argsort(-odds, kind="stable")[: np.count_nonzero(odds)].tolist()
    return first


def best(scores: Floats, count: int) -> tuple[Ids, Doubles]:
    """The `count` best of each row (T, n), the best first, the lowest among equals; and how far every score is below
    the best of its row (T, n)."""
    with np.errstate(invalid="ignore"):  # rows of NaN stay NaN
        behind = (scores.max(-1, keepdims=True) - scores).astype(np.float64)
    # Numbers that are not negative sort as their bits do, and an f32 leaves the lowest 29 bits of an f64 zero. Signs of
    # NaN depend on the machine.
    keys = np.abs(behind).view(np.int64) | np.arange(scores.shape[1])
    first = np.partition(keys, count - 1)[:, :count]
    first.sort()  # how NumPy leaves them depends on the machine, and so would sums of their odds
    return first & (1 << 29) - 1, behind
