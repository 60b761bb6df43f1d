"""The window: which block is read next, where to, and when its place may be used again. Pure policy.

Blocks pass through a ring of bytes in the order of a step, lap after lap. Every block has a fixed place
(`ring_places`). It can be read as soon as nothing is in its place, piece by piece while the blocks before it leave. The
window knows bytes and their order. It reads nothing, waits for nothing and holds no lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shoal.partition.spec import BlockId
from shoal.partition.throughput.ring import ring_places


@dataclass(eq=False)
class Passage:
    """`nbytes` of a block on their way from byte `offset` of a file to `position` in memory."""

    block: BlockId
    offset: int
    position: int
    nbytes: int
    asked: int = 0  # bytes, from the first on, that readers have been asked to read
    landed: int = 0  # bytes whose reads have ended
    error: Exception | None = None  # of the first read that failed
    leases: int = 0
    left: bool = False  # it will not be used again

    @property
    def here(self) -> bool:
        """All of it can be used."""
        return self.landed == self.nbytes and self.error is None

    @property
    def idle(self) -> bool:
        """All of it can be used, and nobody uses it."""
        return self.here and not self.leases

    @property
    def quiet(self) -> bool:
        """No read writes to its place."""
        return self.landed == self.asked

    def ask(self, most_bytes: int) -> Read:
        """The next bytes to read, at most `most_bytes`."""
        start = self.asked
        self.asked = min(self.nbytes, start + most_bytes)
        return Read(self, start, self.asked - start)


class Read(NamedTuple):
    """Bytes [start, start + nbytes) of a passage, to be read now."""

    passage: Passage
    start: int
    nbytes: int


class Extent(NamedTuple):
    """Where in the file a block lies."""

    block: BlockId
    offset: int
    nbytes: int


class Line:
    """Passages that somebody waits for; they are read in the order they came."""

    def __init__(self) -> None:
        self._waiting: deque[Passage] = deque()

    def extend(self, passages: Sequence[Passage]) -> None:
        self._waiting.extend(passages)

    @property
    def idle(self) -> bool:
        return not self._waiting

    def next_read(self, most_bytes: int) -> Read | None:
        if not self._waiting:
            return None
        passage = self._waiting[0]
        read = passage.ask(most_bytes)
        if passage.asked == passage.nbytes:
            self._waiting.popleft()
        return read

    def leave(self, passage: Passage) -> None:
        """Nobody waits for the passage any more, so the rest of it is not read."""
        passage.left = True
        if passage in self._waiting:
            self._waiting.remove(passage)

    def ended(self, passage: Passage) -> None:
        """A read of the passage has ended."""


class Window:
    """A ring of `nbytes` that the blocks of `cycle` pass through. It must hold the largest block. If it holds any two
    neighbours, a block is read while the one before it is used."""

    def __init__(self, nbytes: int, cycle: Sequence[Extent]) -> None:
        self._cycle = cycle
        self._index = {extent.block: i for i, extent in enumerate(cycle)}
        for extent in cycle:
            assert extent.nbytes <= nbytes, f"{extent.block}: {extent.nbytes} of {nbytes}"
        self._positions = ring_places(nbytes, [extent.nbytes for extent in cycle])
        self._next = 0  # the block of the cycle to begin next
        self._passing: list[Passage] = []  # in the order of use

    @property
    def idle(self) -> bool:
        """Whether no blocks pass."""
        return not self._cycle

    def next_read(self, most_bytes: int) -> Read | None:
        """What to read now; None while its place is taken, or if no blocks pass."""
        if not self._cycle:
            return None
        last = self._passing[-1] if self._passing else None
        if last is None or last.left or last.error or last.asked == last.nbytes:
            last = self._begin(self._next)
        start = last.position + last.asked
        end = start + min(most_bytes, last.nbytes - last.asked)
        for other in self._passing:
            if other is not last and other.position < end and start < other.position + other.nbytes:
                return None
        return last.ask(most_bytes)

    def place(self, block: BlockId) -> Passage:
        """Where the block will be, whenever it passes."""
        index = self._index[block]
        return Passage(block, self._cycle[index].offset, self._positions[index], self._cycle[index].nbytes)

    def want(self, block: BlockId) -> Passage:
        """The passage of the block that is used next. Blocks that should have come before it are skipped. If it is not
        on its way, the window begins with it."""
        passage = next((p for p in self._passing if p.block == block and not p.left), None)
        passage = passage or self._begin(self._index[block])
        for skipped in self._passing[: self._passing.index(passage)]:
            assert not skipped.leases, f"{skipped.block} is still used while {block} is wanted"
            skipped.left = True
        self._sweep()
        return passage

    def leave(self, passage: Passage) -> None:
        """The passage has been used, or it failed. Its place is free once no read writes there. If it failed, others
        that failed leave with it: they were read ahead for a step that is over, and are read again."""
        for other in self._passing:
            if other is passage or (passage.error is not None and other.error is not None):
                other.left = True
        self._sweep()

    def ended(self, passage: Passage) -> None:
        """A read of the passage has ended."""
        if passage.left:
            self._sweep()

    def _sweep(self) -> None:
        self._passing = [p for p in self._passing if not (p.left and p.quiet)]

    def _begin(self, index: int) -> Passage:
        self._next = (index + 1) % len(self._cycle)
        passage = self.place(self._cycle[index].block)
        self._passing.append(passage)
        return passage
