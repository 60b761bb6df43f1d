"""Measures what this machine's kernels take for products with weights, by their rows, and for memory.

Weights lie in memory as those of models do and are cold: calls go round through more of them than caches hold. Computes
on the threads that kernels are set to, so nothing else should compute meanwhile.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate, cycle
from pathlib import Path
from statistics import NormalDist, fmean, median, median_low
from typing import NamedTuple

import numpy as np

from shoal.kernels import (
    NARROW_INPUTS,
    WEIGHT_TYPES,
    WIDE_INPUTS,
    ComputeHome,
    FeedForward,
    InputBits,
    Linears,
    Matrix,
    Routes,
    WeightType,
    interleave,
)
from shoal.kernels.arrays import Bytes
from shoal.kernels.huge_pages import Arena, mapped
from shoal.partition.memory_layout import BAND_ROWS
from shoal.partition.throughput.profile import Repeats, RowsLaw

log = logging.getLogger(__name__)

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 256)
MANY_ROWS = 32  # from here on, computing counts, and less memory has to be passed
# Of matrices that share what kernels make of the rows before they multiply. With fewer that would count for more than
# in models.
MANY_ROWS_BYTES = 8 << 20
PASSING_BYTES, PASSING_COLUMNS = 8 << 20, 4096  # more than a core's own caches hold
POOL_BYTES, MOST_POOL_BYTES = 192 << 20, 512 << 20
POOL_TIMES = 4  # as large as the last cache, within these limits
ROUNDS = 3  # of all tables, one after the other: a machine changes its speed within seconds
HELD_UP = 1.3  # times as long as with more rows
HELD_UP_CALL = 2.0  # times the median of the same calls
CALLS = 1  # at least, of each point in a round …
ENOUGH_CALLS = 32  # … and at most: rounds differ by more than these
CELL_S = 0.008  # for which it is called again
_SMALL_CALLS, _SWEPT_BYTES = 48, 16 << 20  # small ones, behind so many bytes of weights at most


class SizeClass(NamedTuple):
    """Matrices of about one size, as they come in models, and how kernels are called with them."""

    name: str
    nbytes: int  # of one matrix
    cols: int
    form: str  # "linears", "gated" or "experts"
    together: int = 1  # matrices of a "linears" that share its inputs


SIZES = (
    SizeClass("small", 256 << 10, 1024, "linears", 3),  # k and v, which q's inputs are for as well
    SizeClass("expert", 1 << 20, 2048, "experts"),
    SizeClass("attention", 8 << 20, 4096, "linears"),
    SizeClass("ffn", 20 << 20, 4096, "gated"),
)
NARROW_ROWS = (1, 4, 16, 64, 256)
EXPERTS = 6  # in one call; with many rows …
EXPERTS_OF_LONG = 2  # … so many
SPREAD = 8  # tokens of a step for each row of an expert: published mixtures choose one expert in 4 to 32


def usual_s(calls: Iterator[Callable[[], object]]) -> float:
    """The mean of what calls took, as steps put them together: on machines that others share, one in ten is held up
    for a while (means of 1.02 to 1.17 times the median). What holds one up for longer comes too rarely to be seen in so
    few, and counts as twice the median."""
    took: list[float] = []
    until_s = time.perf_counter() + CELL_S
    while len(took) < CALLS or (len(took) < ENOUGH_CALLS and time.perf_counter() < until_s):
        call = next(calls)
        began_s = time.perf_counter()
        call()
        took.append(time.perf_counter() - began_s)
    most_s = HELD_UP_CALL * median_low(took)
    return max(1e-9, sum(min(it, most_s) for it in took) / len(took))


def passing(home: ComputeHome, pool: Pool) -> Callable[[], object]:
    """Has weights pass through the caches, as between two calls of a step. There, other cores have made what a call
    reads, and its page tables have gone: with inputs that lie where its last call left them, qkv of a prompt takes 1.1
    to 1.3 times less, attention of a text that begins three times."""
    kind = WEIGHT_TYPES[0]
    nbytes = min(PASSING_BYTES, len(pool.memory) // 2)
    rows = max(1, nbytes // kind.matrix_bytes(BAND_ROWS, PASSING_COLUMNS)) * BAND_ROWS
    x = home.place(np.ones((1, PASSING_COLUMNS), np.float32))
    return lambda: home.linears(x, Linears((pool.matrix(kind, rows, PASSING_COLUMNS),)))


def pool_bytes() -> int:
    """Of a pool: no cache holds half of it, as far as their sizes are known. One of many machines that share a cache of
    hundreds of MB has some of it."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            largest = max(largest, int(path.read_text().strip().removesuffix("K")) << 10)
    return max(POOL_BYTES, min(MOST_POOL_BYTES, POOL_TIMES * largest))


class Pool:
    """Memory that weights are cut from, place after place, round and round."""

    def __init__(self, nbytes: int = 0) -> None:
        self.memory = mapped(nbytes or pool_bytes())
        began_s = time.perf_counter()
        self.memory[:] = 0x11  # a number in every type; each page has to be there
        self.touch_bytes_per_s = len(self.memory) / (time.perf_counter() - began_s)
        self._at = 0

    def take(self, nbytes: int) -> Bytes:
        if self._at + nbytes > len(self.memory):
            self._at = 0
        taken = self.memory[self._at : self._at + nbytes]
        self._at += -(-nbytes // 4096) * 4096
        return taken

    def matrix(self, kind: WeightType, rows: int, cols: int) -> Matrix:
        return Matrix(kind, self.take(kind.matrix_bytes(rows, cols)), rows, cols)


def calls_s(home: ComputeHome, pool: Pool) -> dict[int, float]:
    """What a call of a kernel takes that has next to nothing to do (Python, the threads' waking), by the bytes of its
    weights. So many pass through the caches before each, as before every call of a table: that some of it has to come
    from memory again is no weight's cost, but a layer's (`Overheads.swept`)."""
    sizes = {_passing_bytes(it) for size in SIZES for it in (size, _one(size))}
    return {nbytes: _call_s(home, pool, nbytes) for nbytes in sorted(sizes)}


def _passing_bytes(size: SizeClass) -> int:
    """By a call with few rows, as far as it matters."""
    return min(
        _SWEPT_BYTES, size.nbytes * {"linears": size.together, "gated": 3, "experts": 3 * EXPERTS}[size.form]
    )


def _call_s(home: ComputeHome, pool: Pool, nbytes: int) -> float:
    kind, cols = WEIGHT_TYPES[0], SIZES[-1].cols
    rows = max(1, nbytes // kind.matrix_bytes(BAND_ROWS, cols)) * BAND_ROWS
    one, wide = (home.place(np.ones((1, its), np.float32)) for its in (32, cols))
    arena, took = Arena(), list[float]()
    for _ in range(_SMALL_CALLS):
        linear = Linears((Matrix(kind, arena.take(kind.matrix_bytes(16, 32)), 16, 32),))
        passing = Linears((pool.matrix(kind, rows, cols),))
        home.linears(one, linear)  # what is worked out at the first call is known later
        home.linears(wide, passing)
        began_s = time.perf_counter()
        home.linears(one, linear)
        took.append(time.perf_counter() - began_s)
    return median(took)


def table_rounds(
    home: ComputeHome,
    pool: Pool,
    kinds: Sequence[WeightType],
    done: Callable[[str], None],
    late: Callable[[], bool] = lambda: False,
) -> list[list[RowsLaw]]:
    """Rounds of a table for each type and size, in their order. No type is begun when it is `late`,
    except the first; so later rounds may have fewer. `done` is called before each point."""
    rounds: list[list[RowsLaw]] = []
    for _ in range(ROUNDS):
        calls, laws = calls_s(home, pool), list[RowsLaw]()
        for kind in kinds:
            if (laws or rounds) and late():
                if not rounds:
                    said = "measuring takes too long, as something else computes: no tables for %s and others"
                    log.warning(said, kind.name)
                break
            laws += (table(home, pool, kind, size, WIDE_INPUTS, calls, done) for size in SIZES)
            laws += (table(home, pool, kind, size, NARROW_INPUTS, calls, done) for size in narrow_sizes(kind))
        rounds.append(laws)
    return rounds


def table(
    home: ComputeHome,
    pool: Pool,
    kind: WeightType,
    size: SizeClass,
    input_bits: InputBits,
    calls: Mapping[int, float],
    done: Callable[[str], None],
    below: float = math.inf,
) -> RowsLaw:
    """Of one type and size, for fewer rows than `below`. `calls`: how much of each call is not the weights'
    (`calls_s`)."""
    points, counts = [], _row_counts(input_bits, below)
    for rows in counts:
        done(f"{kind.name}, {size.name}")
        points.append(_point(home, pool, kind, size, rows, calls[_passing_bytes(size)], input_bits))
    byte_s, experts = not_held_up([it for it, _ in points]), size.form == "experts"
    return RowsLaw(kind.name, points[0][1], counts, byte_s, input_bits, experts)


def _row_counts(input_bits: InputBits, below: float) -> tuple[int, ...]:
    """Of which a table has points."""
    return tuple(it for it in (ROWS if input_bits == WIDE_INPUTS else NARROW_ROWS) if it < below)


def table_points(kinds: Sequence[WeightType], below: float = math.inf) -> int:
    """Of all tables for these types, once, for fewer rows than `below`."""
    wide, narrow = len(kinds) * len(SIZES), sum(len(narrow_sizes(kind)) for kind in kinds)
    return wide * len(_row_counts(WIDE_INPUTS, below)) + narrow * len(_row_counts(NARROW_INPUTS, below))


def not_held_up(times: Sequence[float]) -> tuple[float, ...]:
    """What more and more rows take. Some kernels take a little longer for fewer; what took much longer was held up by
    something else."""
    return tuple(min(it, HELD_UP * min(times[place:])) for place, it in enumerate(times))


def narrow_sizes(kind: WeightType) -> Sequence[SizeClass]:
    """Of which tables with narrow inputs are made, one matrix in each call: no block has such inputs only."""
    return [_one(it) for it in SIZES] if kind.quantised else []


def _one(size: SizeClass) -> SizeClass:
    """Of which each call has one matrix."""
    return size._replace(form="linears", together=1)


def middle(rounds: Sequence[Sequence[RowsLaw]]) -> tuple[RowsLaw, ...]:
    """What steps find: the medians of all rounds, of two the less, times what points are held up by on average. A step
    has hundreds of calls, of which some are; of the few of a point, the median has none."""
    few, many = (_held_up(rounds, *its) for its in ((1, MANY_ROWS - 1), (MANY_ROWS, max(ROWS))))

    def usual(laws: Sequence[RowsLaw]) -> Iterator[float]:
        for rows, times in zip(laws[0].rows, zip(*(law.byte_s for law in laws), strict=True), strict=True):
            yield median_low(times) * (few if rows < MANY_ROWS else many)

    return tuple(replace(laws[0], byte_s=tuple(usual(laws))) for laws in _alike(rounds))


def _held_up(rounds: Sequence[Sequence[RowsLaw]], least_rows: int, most_rows: int) -> float:
    """How many times the median of a point's rounds their mean is, on average. A whole round that was slower than the
    others, as the machine was, holds no call up."""
    points = [it for it in _points(rounds, least_rows, most_rows) if len(it) == ROUNDS]
    if not points:
        return 1.0
    paces = [
        median(its) for its in zip(*([it / median(times) for it in times] for times in points), strict=True)
    ]
    found = []
    for times in points:
        even = [it / pace for it, pace in zip(times, paces, strict=True)]
        most = HELD_UP_CALL * median(even)
        found.append(fmean(min(it, most) for it in even) / median(even))
    return max(1.0, fmean(found))


def kernel_repeats(rounds: Sequence[Sequence[RowsLaw]]) -> Repeats:
    """How far rounds usually lie from their middle: with one row, which is read, and with many, which compute."""
    return Repeats(_apart(rounds, 1, 1), _apart(rounds, MANY_ROWS, max(ROWS)))


def _apart(rounds: Sequence[Sequence[RowsLaw]], least_rows: int, most_rows: int) -> float:
    found = [
        (max(times) - min(times)) / (2 * median(times))
        for times in _points(rounds, least_rows, most_rows)
        if len(times) > 1  # one says nothing
    ]
    return min(1.0, median(found)) if found else 0.0


def _points(
    rounds: Sequence[Sequence[RowsLaw]], least_rows: int, most_rows: int
) -> Iterator[tuple[float, ...]]:
    """What each round says of a point, of all points with so many rows."""
    for laws in _alike(rounds):
        for rows, times in zip(laws[0].rows, zip(*(law.byte_s for law in laws), strict=True), strict=True):
            if least_rows <= rows <= most_rows:
                yield times


def _alike(rounds: Sequence[Sequence[RowsLaw]]) -> Iterator[list[RowsLaw]]:
    """What each round has of the same."""
    for place in range(len(rounds[0])):
        yield [laws[place] for laws in rounds if place < len(laws)]


def _point(
    home: ComputeHome,
    pool: Pool,
    kind: WeightType,
    size: SizeClass,
    rows: int,
    call_s: float,
    input_bits: InputBits,
) -> tuple[float, float]:
    """(seconds for each byte of weights, bytes of one matrix)"""
    sharing = 1 if size.form == "linears" else 2  # gate and up
    nbytes = min(size.nbytes, MANY_ROWS_BYTES // sharing) if rows >= MANY_ROWS else size.nbytes
    high = max(1, round(nbytes / kind.matrix_bytes(BAND_ROWS, size.cols))) * BAND_ROWS
    count = (EXPERTS_OF_LONG if rows >= MANY_ROWS else EXPERTS) if size.form == "experts" else 1
    matrices = size.together if size.form == "linears" else 3 * count
    wide = -(-high // 256) * 256  # columns of down are whole blocks of any type
    if size.form == "linears":
        one = kind.matrix_bytes(high, size.cols)
    else:
        one = (2 * kind.matrix_bytes(wide, size.cols) + kind.matrix_bytes(size.cols, wide)) // 3
    coming = max(1, len(pool.memory) // 2 // (matrices * one))
    tokens = rows * SPREAD if size.form == "experts" and rows > 1 else rows
    x = home.place(np.ones((tokens, size.cols), np.float32))
    into = home.place(np.zeros((tokens, size.cols), np.float32))
    routes = _routes(tokens, rows, count)
    no_routes = Routes((0,) * (count + 1), routes.tokens[:0], routes.factors[:0])

    def gated() -> FeedForward:
        enter = Linears((pool.matrix(kind, wide, size.cols), pool.matrix(kind, wide, size.cols)))
        return FeedForward(enter, Linears((pool.matrix(kind, size.cols, wide),)), "silu")

    def call() -> Callable[[], object]:
        """Of weights that were used before, as a model's are: what is worked out about them then is known."""
        if size.form == "linears":
            each = (pool.matrix(kind, high, size.cols) for _ in range(size.together))
            linears = Linears(tuple(each), input_bits=input_bits)
            home.linears(x[:0], linears)
            return partial(home.linears, x, linears)
        if size.form == "gated":
            layer = gated()
            home.feed_forward(x[:0], layer)
            return partial(home.feed_forward, x, layer)
        layers = [gated() for _ in range(count)]
        home.experts(x[:0], layers, no_routes, into[:0])
        return partial(home.experts, x, layers, routes, into)

    def turns() -> Iterator[Callable[[], object]]:
        passed = passing(home, pool)
        for its in cycle(call() for _ in range(coming)):
            if rows >= MANY_ROWS or tokens > rows:
                passed()
            yield its

    calls = turns()
    # So few calls of many rows have time that the first counts, whose results lie in memory that is new.
    if rows >= MANY_ROWS:
        next(calls)()
    seconds = usual_s(calls)
    return max(0.05 * seconds, seconds - call_s) / (matrices * one), float(one)


def _routes(tokens: int, rows: int, experts: int) -> Routes:
    """Of so many tokens, `rows` to each expert on average: more to some than to others, as where each token goes to one
    in `SPREAD`. (Kernels take so many rows together, so few above and few below do not make up for each other.)"""
    apart = NormalDist(rows, math.sqrt(rows * (1 - rows / tokens)) or 1e-9)
    counts = [max(1, round(apart.inv_cdf(1 - (i + 0.5) / experts))) for i in range(experts)]
    counts[0] += rows * experts - sum(counts)
    chosen = [
        (np.arange(count, dtype=np.int64) * tokens + i % tokens) // count for i, count in enumerate(counts)
    ]
    starts = (0, *accumulate(counts))
    return Routes(starts, np.concatenate(chosen), np.ones(starts[-1], np.float32))


def memory_bytes_per_s(laws: Sequence[RowsLaw]) -> float:
    """At which weights are read for one row: what a quarter of the types and sizes reach or exceed, of matrices that no
    cache holds. The others compute for longer, and the quickest of many was lucky."""
    largest = max(law.nbytes for law in laws)
    speeds = sorted(1 / law.byte_s[0] for law in laws if law.nbytes > largest / 4)
    return speeds[3 * (len(speeds) - 1) // 4]


def flops_of(law: RowsLaw) -> float:
    """Operations per second with the most rows, a multiplication and an addition counted as two."""
    kind = next(it for it in WEIGHT_TYPES if it.name == law.kind)
    return 2 / law.byte_s[-1] * law.rows[-1] * kind.block_weights / kind.block_bytes


def laid_out_bytes_per_s(kind: WeightType) -> float:
    """How fast rows are put into bands."""
    stored = np.full((1024, kind.row_bytes(4096)), 0x11, np.uint8)
    into = Arena().take(kind.matrix_bytes(1024, 4096))
    into[:] = 0
    return stored.nbytes / usual_s(iter(lambda: partial(interleave, kind, stored, into), None))
