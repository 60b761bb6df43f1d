"""An order: one step as one rank carries it out, and what comes of it.

Plain data, the same for every rank of a group. Knows token ids, positions and pages; not whose they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shoal.kernels.arrays import Floats
from shoal.offload.kv.disk_index import Entry
from shoal.offload.kv.prefix_cache import Move


class Segment(NamedTuple):
    """Tokens of one text that follow each other, from position `start` on. K and V are in `pages`, from position 0 on.
    The logits after the last `rows_wanted` of the tokens are asked for."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    rows_wanted: int


class Reading(NamedTuple):
    """These pages on disk are read into those of the pool, in this order, until one fails."""

    entries: Sequence[Entry]
    pages: Sequence[int]


@dataclass(frozen=True, eq=False)
class Order:
    """First pages are moved, in this order; then pages are read from disk; then the segments are computed."""

    segments: Sequence[Segment] = ()
    moves: Sequence[Move] = ()
    readings: Sequence[Reading] = ()


class Result(NamedTuple):
    """`logits` (R, vocab) of the rows that the segments want, one after the other, on rank 0. `pages_read`: of each
    reading, how many of its pages. `read_s` seconds were spent on that, `stall_s` on waiting for weights."""

    logits: Floats
    pages_read: list[int]
    read_s: float
    stall_s: float
