"""Measures what this machine's kernels take: products with weights by their rows, attention by context, and memory.

Weights lie in memory as those of models do and are cold: calls go round through more of them than caches hold. Computes
on the threads that kernels are set to, so nothing else should compute meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import NamedTuple

import numpy as np

from shoal.kernels import (
    WEIGHT_TYPES,
    ComputeHome,
    FeedForward,
    Linears,
    Matrix,
    Routes,
    WeightType,
    interleave,
)
from shoal.kernels.arrays import Bytes
from shoal.kernels.attention_operands import KvPages, Rotation, Scoring, Segments, kv_layout
from shoal.kernels.huge_pages import Arena, mapped
from shoal.partition.memory_layout import BAND_ROWS, KV_FORMATS, PAGE_TOKENS
from shoal.partition.throughput.profile import AttentionLaw, RowsLaw

log = logging.getLogger(__name__)

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 256)
MANY_ROWS = 32  # from here on, computing counts, and less memory has to be passed
MANY_ROWS_BYTES = 2 << 20
POOL_BYTES = 192 << 20
CALLS = 3  # at least, of each
CELL_S = 0.02

HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128
CONTEXTS = (64, 512, 2048)
CHUNK_ROWS = 64
KV_COPIES = 6  # sequences that are attended to in turn, so that K and V are cold


class SizeClass(NamedTuple):
    """Matrices of about one size, as they come in models, and how kernels are called with them."""

    name: str
    nbytes: int  # of one matrix
    cols: int
    form: str  # "linears", "gated" or "experts"


SIZES = (
    SizeClass("small", 256 << 10, 1024, "linears"),
    SizeClass("expert", 1 << 20, 2048, "experts"),
    SizeClass("attention", 8 << 20, 4096, "linears"),
    SizeClass("ffn", 20 << 20, 4096, "gated"),
)
EXPERTS = 6  # in one call; with many rows …
EXPERTS_OF_LONG = 2  # … so many


def usual_s(calls: Iterator[Callable[[], object]]) -> float:
    """The median of what calls took. The least of many is a fifth less than what a step finds: memory is rarely as
    quick as it can be."""
    took: list[float] = []
    until_s = time.perf_counter() + CELL_S
    while len(took) < CALLS or time.perf_counter() < until_s:
        call = next(calls)
        began_s = time.perf_counter()
        call()
        took.append(time.perf_counter() - began_s)
    return max(1e-9, sorted(took)[(len(took) - 1) // 2])


class Pool:
    """Memory that weights are cut from, place after place, round and round."""

    def __init__(self) -> None:
        self.memory = mapped(POOL_BYTES)
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


def call_s(home: ComputeHome) -> float:
    """What a call of a kernel takes that has next to nothing to do: Python, the threads' waking."""
    x = home.place(np.ones((1, 32), np.float32))
    linear = Linears((Matrix(WEIGHT_TYPES[0], Arena().take(16 * 32 * 4), 16, 32),))
    return usual_s(iter(lambda: partial(home.linears, x, linear), None))


def rows_laws(
    home: ComputeHome,
    pool: Pool,
    kinds: Sequence[WeightType],
    calls_s: float,
    until_s: float,
    done: Callable[[str], None],
) -> Iterator[RowsLaw]:
    """A table for each type and size, in their order. `calls_s`: of each call is not the weights'. No type is begun
    when the monotonic clock shows `until_s`, except the first."""
    for number, kind in enumerate(kinds):
        if number and time.monotonic() > until_s:
            log.warning(
                "measuring takes too long, as something else computes: no tables for %s and others", kind.name
            )
            return
        for size in SIZES:
            done(f"{kind.name}, {size.name}")
            points = [_point(home, pool, kind, size, rows, calls_s) for rows in ROWS]
            yield RowsLaw(kind.name, points[0][1], ROWS, tuple(byte_s for byte_s, _ in points))


def _point(
    home: ComputeHome, pool: Pool, kind: WeightType, size: SizeClass, rows: int, calls_s: float
) -> tuple[float, float]:
    """(seconds for each byte of weights, bytes of one matrix)"""
    nbytes = min(size.nbytes, MANY_ROWS_BYTES) if rows >= MANY_ROWS else size.nbytes
    high = max(1, round(nbytes / kind.matrix_bytes(BAND_ROWS, size.cols))) * BAND_ROWS
    count = (EXPERTS_OF_LONG if rows >= MANY_ROWS else EXPERTS) if size.form == "experts" else 1
    matrices = 1 if size.form == "linears" else 3 * count
    wide = -(-high // 256) * 256  # columns of down are whole blocks of any type
    x = home.place(np.ones((rows, size.cols), np.float32))
    into = home.place(np.zeros((rows, size.cols), np.float32))
    nums = np.tile(np.arange(rows, dtype=np.int64), count)
    routes = Routes(tuple(rows * i for i in range(count + 1)), nums, np.ones(len(nums), np.float32))

    def gated() -> FeedForward:
        enter = Linears((pool.matrix(kind, wide, size.cols), pool.matrix(kind, wide, size.cols)))
        return FeedForward(enter, Linears((pool.matrix(kind, size.cols, wide),)), "silu")

    def call() -> Callable[[], object]:
        if size.form == "linears":
            return partial(home.linears, x, Linears((pool.matrix(kind, high, size.cols),)))
        if size.form == "gated":
            return partial(home.feed_forward, x, gated())
        return partial(home.experts, x, [gated() for _ in range(count)], routes, into)

    if size.form == "linears":
        one = kind.matrix_bytes(high, size.cols)
    else:
        one = (2 * kind.matrix_bytes(wide, size.cols) + kind.matrix_bytes(size.cols, wide)) // 3
    # As in a model, the same calls come again and again: what is worked out at the first is known later.
    seconds = usual_s(cycle([call() for _ in range(max(1, len(pool.memory) // (matrices * one)))]))
    return max(0.05 * seconds, seconds - calls_s) / (matrices * one), float(one)


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


def attention_laws(
    home: ComputeHome, done: Callable[[str], None], kv_types: Iterable[str] = KV_FORMATS
) -> Iterator[AttentionLaw]:
    """For each type of K and V, decodes and chunks of prompts by what they see."""
    for kv_type in kv_types:
        done(f"attention, {kv_type}")
        layout = kv_layout(kv_type, HEAD_DIM)
        pages = (CONTEXTS[-1] + CHUNK_ROWS) // PAGE_TOKENS + 1
        memory = Arena().take(KV_COPIES * pages * KV_HEADS * layout.head_bytes)
        memory[:] = 0  # every page has to be there
        kv = KvPages(layout, HEADS, memory.reshape(KV_COPIES * pages, KV_HEADS, layout.head_bytes))
        own = [range(copy * pages, (copy + 1) * pages) for copy in range(KV_COPIES)]
        decode = tuple(_number_s(home, kv, own, 1, context) for context in CONTEXTS)
        prompt = tuple(_number_s(home, kv, own, CHUNK_ROWS, context) for context in CONTEXTS)
        yield AttentionLaw(kv_type, CONTEXTS, decode, prompt)


def _number_s(home: ComputeHome, kv: KvPages, own: Sequence[range], rows: int, context: int) -> float:
    """Seconds for a number of a query and a token that it sees; rows see `context` tokens on average."""
    start = max(0, context - (rows + 1) // 2)
    q, k, v = (
        home.place(np.full((rows, heads * HEAD_DIM), 0.1, np.float32))
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    angles = np.zeros((rows, HEAD_DIM // 2), np.float32)
    scoring = Scoring(Rotation(HEAD_DIM, False, angles + 1, angles), HEAD_DIM**-0.5)

    def calls() -> Iterator[Callable[[], object]]:
        while True:
            for pages in own:
                segments = Segments.build([(rows, start, list(pages))])
                yield partial(home.attention, kv, segments, q, k, v, scoring)

    seen = rows * start + rows * (rows + 1) / 2
    return usual_s(calls()) / (seen * HEADS * HEAD_DIM)


def laid_out_bytes_per_s(kind: WeightType) -> float:
    """How fast rows are put into bands."""
    stored = np.full((1024, kind.row_bytes(4096)), 0x11, np.uint8)
    into = Arena().take(kind.matrix_bytes(1024, 4096))
    into[:] = 0
    return stored.nbytes / usual_s(iter(lambda: partial(interleave, kind, stored, into), None))
