"""An order: one step as every rank of a group carries it out, and its result.

Plain data. Knows token ids, positions and pages; not whose they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shoal.kernels.arrays import Floats
from shoal.models.step import Segment
from shoal.offload.kv.disk_index import Entry, Slot
from shoal.offload.kv.prefix_cache import Move

__all__ = ["Order", "Reading", "Result", "Segment"]


class Reading(NamedTuple):
    """Read these entries on disk into these pages of the pool, in this order, until one fails. Ranks other than 0 are
    told their places alone."""

    entries: Sequence[Entry | Slot]
    pages: Sequence[int]


@dataclass(frozen=True, eq=False)
class Order:
    """First pages are moved, in this order; then pages are read from disk; then the segments are computed.

    Where rank 0 has K and V of all heads, the other ranks get those of the pages `sent` from it before they compute,
    each of its own heads, and give it those of the pages `returned` afterwards.

    A rank without an embedding uses only the number of the segments' tokens: for it, any will do.
    """

    segments: Sequence[Segment] = ()
    moves: Sequence[Move] = ()
    readings: Sequence[Reading] = ()
    sent: Sequence[int] = ()
    returned: Sequence[int] = ()


class Result(NamedTuple):
    """`logits` (R, vocab) of the rows that the segments want, in their order, at rank 0, elsewhere none. `pages_read`:
    how many pages of each reading could be read. That took `read_s` seconds; `stall_s` were spent on waiting for
    weights."""

    logits: Floats
    pages_read: list[int]
    read_s: float
    stall_s: float
