"""Measures what the processor's caches do for weights that come round in every step.

A model of a hundred MB may be read twice as fast as memory is: the last cache of a server has hundreds, of which a
machine that shares it keeps some. Sizes that processors state say nothing of that share.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from shoal.kernels import NARROW_INPUTS, WIDE_INPUTS, ComputeHome, Linears, WeightType
from shoal.kernels.arrays import Floats
from shoal.partition.memory_layout import BAND_ROWS
from shoal.partition.throughput.profile import CacheLaw, RowsLaw

from .kernel_laws import ROUNDS, SIZES, Pool, calls_s, narrow_sizes, table

log = logging.getLogger(__name__)

KEPT_BYTES = 24 << 20  # that a large last cache keeps, and the caches before it do not
PARTS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the pool, that come round
LEAST_GAIN = 0.9  # times as long as from memory: caches that do less are not worth a law
COLUMNS = 4096
_BEFORE, _COUNTED = 4, 2  # rounds
# With so many, weights from memory take no longer: 0.99 to 1.02 times as long in the median of 14 types of each size.
COMPUTED_ROWS = 256
MATRICES = 96  # that the pool is divided into


def cache_law(
    home: ComputeHome,
    pool: Pool,
    kinds: Sequence[WeightType],
    laws: Sequence[RowsLaw],
    done: Callable[[str], None],
    late: Callable[[], bool] = lambda: False,
    over: Callable[[], bool] = lambda: False,
) -> CacheLaw | None:
    """With tables for `kinds`, of which `laws` has those of weights from memory. None where caches keep too little to
    matter, or if time is `over`. `done` is called before each point. When it is `late`, no further round is begun; when
    time is over, no further type: weights of those are taken to come from memory."""
    if over():
        log.warning("measuring takes too long, as something else computes: what caches keep is left out")
        return None
    nbytes, took = _rounds(home, pool, kinds[0], done, late)
    least, whole = took[0], took[-1]
    if least > LEAST_GAIN * whole:
        return None
    shares = [min(1.0, max(0.0, (one - least) / (whole - least))) for one in took]
    # Of more, caches never keep more: a quicker round of more bytes was lucky.
    rising = tuple(min(shares[place:]) for place in range(len(shares)))
    few = Pool(KEPT_BYTES)
    calls = calls_s(home, few)
    tables: list[RowsLaw] = []
    for kind in kinds:
        if over():
            said = "measuring takes too long, as something else computes: no tables for %s"
            log.warning(said, f"what caches keep of {kind.name} and others")
            break
        inputs = [(size, WIDE_INPUTS) for size in SIZES] + [(it, NARROW_INPUTS) for it in narrow_sizes(kind)]
        tables += (table(home, few, kind, *its, calls, done, below=COMPUTED_ROWS) for its in inputs)
    return CacheLaw(nbytes, rising, tuple(_with_more_rows(it, laws) for it in tables))


def _with_more_rows(law: RowsLaw, laws: Sequence[RowsLaw]) -> RowsLaw:
    """And what weights from memory take with those rows that were not measured."""
    known = next(it for it in laws if replace(it, rows=law.rows, byte_s=law.byte_s) == law)
    return replace(known, byte_s=(*law.byte_s, *known.byte_s[len(law.rows) :]))


def _rounds(
    home: ComputeHome, pool: Pool, kind: WeightType, done: Callable[[str], None], late: Callable[[], bool]
) -> tuple[tuple[int, ...], list[float]]:
    """(bytes of rounds, from those that caches keep to all of the pool; seconds of one product with one row in them)"""
    rows = max(1, len(pool.memory) // MATRICES // kind.matrix_bytes(BAND_ROWS, COLUMNS)) * BAND_ROWS
    one = kind.matrix_bytes(rows, COLUMNS)
    x = home.place(np.ones((1, COLUMNS), np.float32))
    each = [Linears((pool.matrix(kind, rows, COLUMNS),)) for _ in range(len(pool.memory) // one - 1)]
    counts = sorted({max(1, KEPT_BYTES // one), *(round(part * len(each)) for part in PARTS)})
    rounds: list[list[float]] = []
    while not rounds or (len(rounds) < ROUNDS and not late()):
        rounds.append([])
        for count in counts:
            done("what caches keep")
            rounds[-1].append(_round_s(home, x, each[:count]))
    return tuple(count * one for count in counts), [median(took) for took in zip(*rounds, strict=True)]


def _round_s(home: ComputeHome, x: Floats, each: Sequence[Linears]) -> float:
    """Of one product, on average of two rounds that follow others: a cache that is too small keeps more in the first
    ones than it does in the long run. From the last of these on, after each as much time passes again, as it does in
    steps of models that caches hold, for calls and what is computed besides: meanwhile others of the machine fill what
    all share (1 ms takes as much as 4 to 5 MB of weights that come round: docs/LOG.md)."""
    took_s = 0.0
    for place in range(_BEFORE + _COUNTED):
        for linear in each:
            began_s = time.perf_counter()
            home.linears(x, linear)
            ended_s = time.perf_counter()
            took_s += ended_s - began_s if place >= _BEFORE else 0.0
            until_s = 2 * ended_s - began_s if place >= _BEFORE - 1 else ended_s
            while time.perf_counter() < until_s:
                pass
    return took_s / (_COUNTED * len(each))
