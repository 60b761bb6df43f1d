"""Memory of the host that is page-locked where it lies, so that a device copies from it by itself.

Weights that pass in every step would else go by way of a `PinnedRing`: each byte is read and written once more, by a
processor that has attention to compute. Locking takes time once, and the system may give less than was asked for. Knows
addresses and pages; not what lies there.
"""

from __future__ import annotations

import mmap
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

    def lock(self, start: int, nbytes: int) -> None:
        """See `OpenDevice`."""
        ...

    def unlock(self, start: int) -> None: ...


class LockedRanges:
    """Ranges of addresses, none of which has a byte of another. One thread changes them; any thread may ask."""

    def __init__(self) -> None:
        self._ranges: tuple[tuple[int, int], ...] = ()  # begin and end, never changed in place

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self._ranges)

    def add(self, start: int, nbytes: int) -> None:
        self._ranges = (*self._ranges, (start, start + nbytes))

    def remove(self, start: int) -> bool:
        """False if none begins there."""
        before = self._ranges
        self._ranges = tuple(it for it in before if it[0] != start)
        return len(self._ranges) < len(before)

    def whole(self, start: int, nbytes: int) -> bool:
        """Whether one of them has all these bytes."""
        return any(its[0] <= start and start + nbytes <= its[1] for its in self._ranges)

    def some(self, start: int, nbytes: int) -> bool:
        """Whether one of them has any of these bytes."""
        return any(its[0] < start + nbytes and start < its[1] for its in self._ranges)


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
                device.lock(start, nbytes)
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
