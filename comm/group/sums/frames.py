"""Frames of the data channel between two ranks: a header of fixed size, then bytes.

    kind      what it is (`FrameKind`)
    epoch     which grouping of machines it belongs to; a frame of another epoch is never used
    number    of the order that it belongs to
    place     the how-manieth exchange of that order it is, from 0
    nbytes    what follows; the receiver knows by itself how much that may be

Little-endian u32 each. Knows bytes; not sockets, nor what is in them.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

HEADER = struct.Struct("<5I")
MAX_ORDER_BYTES = 1 << 24
MAX_REASON_BYTES = 2000
WRAP = 1 << 32


class FrameKind(IntEnum):
    ORDER = 1  # rank 0 → others: an order begins
    ROWS = 2  # rank 0 → others: rows that only rank 0 had
    PART = 3  # a partial sum, or columns; or, where sums are sliced, the sum of some rows
    SUM = 4  # rank 0 → others: the sum of all parts
    GIVE_UP = 5  # rank 0 → others: nobody goes on with this order
    FAILED = 6  # others → all: this rank cannot go on with it, and why
    CUT_OFF = 7  # others → rank 0: this rank hears nothing of the one whose number is the place, and why
    MANNERS = 8  # rank 0 → others: how sums are made from now on


class Header(NamedTuple):
    kind: int
    epoch: int
    number: int
    place: int
    nbytes: int

    def packed(self) -> bytes:
        return HEADER.pack(*self)

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Header:
        return cls(*HEADER.unpack(data))
