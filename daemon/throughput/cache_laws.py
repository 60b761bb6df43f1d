"""Measures what the processor's caches do for weights that come round in every step.

A model of a hundred MB may be read twice as fast as memory is: the last cache of a server has hundreds, of which a
machine that shares it keeps some, less of what it does not use for long. Sizes that processors state say nothing of
that share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import numpy as np

from shoal.kernels import NARROW_INPUTS, ComputeHome, Linears, WeightType
from shoal.kernels.arrays import Floats
from shoal.partition.memory_layout import BAND_ROWS
from shoal.partition.throughput.profile import CacheLaw

from .kernel_laws import ROUNDS, SIZES, Pool, calls_s, narrow_sizes, table

KEPT_BYTES = 24 << 20  # that a large last cache keeps, and the caches before it do not
PARTS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the pool, that come round
LEAST_GAIN = 0.9  # times as long as from memory: caches that do less are not worth a law
COLUMNS = 4096
_BEFORE, _COUNTED = 4, 2  # rounds
MATRICES = 256  # that the pool is divided into
SLOW_PARTS = (3 / 32, 1 / 8, 5 / 32, 3 / 16, 1 / 4)  # of the pool, that come round more slowly, too: …
SLOW_PAUSE_S = 200e-6  # … so long before each product, in which threads do not fall asleep
OTHERS_BYTES_PER_S = (0.0, *(1e9 * 2 ** (step / 2) for step in range(13)))  # up to 64 GB/s


class Round(NamedTuple):
    """Products with so many bytes, one after the other: seconds of each, and of all with the pauses between them."""

    nbytes: int
    product_s: float
    round_s: float


def cache_law(
    home: ComputeHome, pool: Pool, kinds: Sequence[WeightType], done: Callable[[str], None]
) -> CacheLaw | None:
    """With tables for `kinds`. None where caches keep too little to matter. `done` is called before each point."""
    quick, slow = _rounds(home, pool, kinds[0], done)
    if quick[0].product_s > LEAST_GAIN * quick[-1].product_s:
        return None
    few = Pool(KEPT_BYTES)
    calls = calls_s(home, few)
    tables = [table(home, few, kind, size, calls, done) for kind in kinds for size in SIZES]
    for kind in kinds:
        tables += (table(home, few, kind, size, calls, done, NARROW_INPUTS) for size in narrow_sizes(kind))
    return replace(law_of(quick, slow), products=tuple(tables))


def law_of(quick: Sequence[Round], slow: Sequence[Round]) -> CacheLaw:
    """Without tables. Of more, caches never keep more: a quicker round of more bytes was lucky. Whoever shares the
    caches brings so much into them that slow rounds find as little left as they did. The first of these is of bytes
    that caches keep anyhow, and has what pauses cost a product."""
    least_s, more_s = quick[0].product_s, quick[-1].product_s - quick[0].product_s
    shares = [min(1.0, max(0.0, (it.product_s - least_s) / more_s)) for it in quick]
    rising = tuple(min(shares[place:]) for place in range(len(shares)))
    left = [min(1.0, max(0.0, (it.product_s - slow[0].product_s) / more_s)) for it in slow]

    usual_s = [
        it.round_s * (least_s + share * more_s) / it.product_s
        for it, share in zip(quick, rising, strict=True)
    ]

    def law(others: float) -> CacheLaw:
        passing = tuple(round(it.nbytes + others * s) for it, s in zip(quick, usual_s, strict=True))
        return CacheLaw(passing, rising, others_bytes_per_s=others)

    def error(found: CacheLaw) -> float:
        pairs = zip(slow, left, strict=True)
        return sum((found.share(it.nbytes, it.round_s) - share) ** 2 for it, share in pairs)

    return min(map(law, OTHERS_BYTES_PER_S), key=error)


def _rounds(
    home: ComputeHome, pool: Pool, kind: WeightType, done: Callable[[str], None]
) -> tuple[list[Round], list[Round]]:
    """Rounds with one row, of weights that caches keep to all of the pool; and slow ones of some of that."""
    rows = max(1, len(pool.memory) // MATRICES // kind.matrix_bytes(BAND_ROWS, COLUMNS)) * BAND_ROWS
    one = kind.matrix_bytes(rows, COLUMNS)
    x = home.place(np.ones((1, COLUMNS), np.float32))
    each = [Linears((pool.matrix(kind, rows, COLUMNS),)) for _ in range(len(pool.memory) // one - 1)]
    kept = max(1, KEPT_BYTES // one)

    def counts(parts: Sequence[float]) -> list[int]:
        return sorted({kept, *(round(part * len(each)) for part in parts)})

    asked = [(count, 0.0) for count in counts(PARTS)] + [
        (count, SLOW_PAUSE_S) for count in counts(SLOW_PARTS)
    ]
    rounds: list[list[float]] = []
    for _ in range(ROUNDS):
        rounds.append([])
        for count, pause_s in asked:
            done("what caches keep")
            rounds[-1].append(_product_s(home, x, each[:count], pause_s))
    found = [
        Round(count * one, product_s, count * (product_s + pause_s))
        for (count, pause_s), product_s in zip(asked, map(median, zip(*rounds, strict=True)), strict=True)
    ]
    return found[: len(counts(PARTS))], found[len(counts(PARTS)) :]


def _product_s(home: ComputeHome, x: Floats, each: Sequence[Linears], pause_s: float) -> float:
    """Of one product, on average of two rounds that follow others: a cache that is too small keeps more in the first
    ones than it does in the long run."""
    took_s = 0.0
    for place in range(_BEFORE + _COUNTED):
        for linear in each:
            began_s = time.perf_counter() + pause_s
            while time.perf_counter() < began_s:
                pass  # asleep, a processor would have to wake first
            began_s = time.perf_counter()
            home.linears(x, linear)
            took_s += (time.perf_counter() - began_s) if place >= _BEFORE else 0.0
    return took_s / (_COUNTED * len(each))
