"""Memory of the host that is page-locked where it lies, so that a device copies from it by itself.

Weights that pass in every step would else go by way of a `PinnedRing`: each byte is read and written once more, by a
processor that has attention to compute. Locking takes time once, and the system may give less than was asked for. Knows
addresses and pages; not what lies there.
"""

from __future__ import annotations

import mmap
import resource
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Protocol

from shoal.kernels.arrays import Bytes
from shoal.kernels.errors import HomeLost
from shoal.partition.amounts import format_bytes

from .errors import NotPageLocked

LOCKED_AT_ONCE_BYTES = 256 << 20  # where there is not enough for all, as many go without
SYSTEM_PAGE_BYTES = mmap.PAGESIZE


class Locking(Protocol):
    """A device, as far as it locks memory."""

    name: str

    def lock(self, start: int, nbytes: int, owner: object) -> None:
        """See `OpenDevice`."""
        ...

    def unlock(self, start: int) -> None: ...


class LockedRanges:
    """Ranges of addresses, none of which has a byte of another. Any thread may call it, for each packet, too."""

    def __init__(self) -> None:
        self._ranges: tuple[tuple[int, int], ...] = ()  # begin and end, in order; never changed in place
        self._lock = threading.RLock()  # of who changes them, which the garbage collector may, too

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self._ranges)

    def add(self, start: int, nbytes: int) -> None:
        with self._lock:
            self._ranges = tuple(sorted((*self._ranges, (start, start + nbytes))))

    def remove(self, start: int) -> int:
        """How many bytes there were; 0 if none begins there."""
        with self._lock:
            before = self.nbytes
            self._ranges = tuple(it for it in self._ranges if it[0] != start)
            return before - self.nbytes

    def whole(self, start: int, nbytes: int) -> bool:
        """Whether one of them has all these bytes."""
        begin, stop = self._last_before(start + 1)
        return begin <= start and start + nbytes <= stop

    def some(self, start: int, nbytes: int) -> bool:
        """Whether one of them has any of these bytes."""
        return start < self._last_before(start + nbytes)[1]

    def _last_before(self, end: int) -> tuple[int, int]:
        """The last one that begins before this address; an empty one if there is none."""
        ranges = self._ranges
        place = bisect_left(ranges, (end, 0))
        return ranges[place - 1] if place else (0, 0)


class PageLocked:
    """As much of these arrays as the system lets, from their first pages on, until `release`. `trouble`: why it is not
    all, in one line."""

    def __init__(self, device: Locking, all: Iterable[Bytes]) -> None:
        self._device = device
        self._keeps = list(all)
        self._starts: list[int] = []
        self.nbytes, self.trouble = 0, ""
        pieces = list(_pieces(self._keeps))
        for start, nbytes in pieces:
            try:
                device.lock(start, nbytes, self._keeps)
            except NotPageLocked as error:
                locked, whole = format_bytes(self.nbytes), format_bytes(sum(it[1] for it in pieces))
                self.trouble = (
                    f"{locked} of {whole} of the weights that pass through device {device.name} are page-locked "
                    f"where they lie, and the processor has to copy the others: {error}"
                )
                return
            self._starts.append(start)
            self.nbytes += nbytes

    def release(self) -> None:
        """Idempotent; also where the device is lost."""
        starts, self._starts = self._starts, []
        for start in starts:
            with suppress(HomeLost):
                self._device.unlock(start)
        self._keeps, self.nbytes = [], 0

    def __del__(self) -> None:
        self.release()


def _pieces(all: Iterable[Bytes]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the pages that these arrays lie in, each page once."""
    begin = end = 0
    for start, nbytes in sorted((it.ctypes.data, it.nbytes) for it in all if it.nbytes):
        first = max(end, start // SYSTEM_PAGE_BYTES * SYSTEM_PAGE_BYTES)
        if first > end:
            yield from _cut(begin, end)
            begin = first
        end = max(end, -(-(start + nbytes) // SYSTEM_PAGE_BYTES) * SYSTEM_PAGE_BYTES)
    yield from _cut(begin, end)


def _cut(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for start in range(begin, end, LOCKED_AT_ONCE_BYTES):
        yield start, min(LOCKED_AT_ONCE_BYTES, end - start)


def limit_on_locking(nbytes: int) -> str:
    """What may be the reason that so many bytes cannot be locked; "" if nothing is known."""
    most, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if most == resource.RLIM_INFINITY or most >= nbytes:
        return ""
    return f" (this process may lock {format_bytes(most)}: ulimit -l)"
