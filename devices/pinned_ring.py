"""Page-locked memory of the host that the copies of one queue pass through, round and round.

A driver copies memory that the system may move only by way of memory of its own, while the caller waits. Page-locked
memory it copies by itself. Weights lie in the other kind, so their packets pass through pieces of this one. A queue
does one thing after the other, so pieces become free in the order in which they were taken.

Knows places and whose turn it is, and how bytes are cut into packets; not what is copied, nor how to wait for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

ALIGNMENT = 256  # of pieces, in bytes


class CopyEnds(NamedTuple):
    """What is copied, and where to: two arrays of torch's kind."""

    source: Any
    target: Any

    @property
    def whole(self) -> bool:
        return bool(self.source.numel()) and all(it.is_contiguous() for it in self)


def begin_copies(all: Sequence[CopyEnds]) -> None:
    for source, target in all:
        target.copy_(source, non_blocking=True)


def packets(all: Sequence[CopyEnds], most_bytes: int) -> Iterator[CopyEnds]:
    """Bytes (n,), in packets of at most so many."""
    for source, target in all:
        for start in range(0, len(source), most_bytes):
            yield CopyEnds(source[start : start + most_bytes], target[start : start + most_bytes])


class Bunch(NamedTuple):
    """Bytes that pass through one piece of the memory together, of `nbytes`, and where in it each of them begins."""

    copies: list[CopyEnds]
    starts: list[int]
    nbytes: int

    def by_way_of(self, piece: Any, *, leaves: bool) -> tuple[list[CopyEnds], Callable[[], object]]:
        """The copies to begin, and what takes what came when they have ended. What does not leave is put there now."""
        parts = [piece[at : at + len(its.source)] for its, at in zip(self.copies, self.starts, strict=True)]
        coming = [CopyEnds(part, its.target) for its, part in zip(self.copies, parts, strict=True)]
        going = [CopyEnds(its.source, part) for its, part in zip(self.copies, parts, strict=True)]
        if leaves:
            return going, partial(_copied, coming)
        _copied(going)
        return coming, bool


def _copied(all: Sequence[CopyEnds]) -> None:
    """On the host, now."""
    for source, target in all:
        target.copy_(source)


def bunched(all: Iterable[CopyEnds], most_bytes: int) -> Iterator[Bunch]:
    """Packets that follow each other, as many together as have no more bytes: each that is begun costs who begins it as
    much as copying a hundred kilobytes."""
    copies: list[CopyEnds] = []
    starts: list[int] = []
    end = 0
    for its in all:
        if copies and end + len(its.source) > most_bytes:
            yield Bunch(copies, starts, end)
            copies, starts, end = [], [], 0
        copies.append(its)
        starts.append(end)
        end += -(-len(its.source) // ALIGNMENT) * ALIGNMENT
    if copies:
        yield Bunch(copies, starts, end)


class _Piece(NamedTuple):
    """`begin`: in bytes since the first one. `land` takes what came, when `copy` has ended."""

    begin: int
    copy: Any
    land: Callable[[], object]


class PinnedRing:
    """`memory` (n,) of a multiple of ALIGNMENT bytes, that parts can be taken of. Any thread may call it."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self._nbytes = len(memory)
        assert self._nbytes % ALIGNMENT == 0, "pieces begin at multiples"
        self._end = 0  # of the last piece, in bytes since the first one
        self._pieces: deque[_Piece] = deque()
        self._lock = threading.RLock()  # the garbage collector may come by, and land what is here

    @contextmanager
    def room(self, nbytes: int, wait: Callable[[Any], None]) -> Iterator[Any]:
        """So much of the memory, for whoever begins a copy to or from there and says so (`take`) before others have a
        turn. `wait` waits for the end of a copy that has these bytes; meanwhile others may land theirs."""
        assert nbytes <= self._nbytes, "a packet is larger than the ring"
        while True:
            with self._lock:
                start = self._end % self._nbytes
                if start + nbytes > self._nbytes:
                    self._end += self._nbytes - start
                    start = 0
                if not (self._pieces and self._end + nbytes - self._pieces[0].begin > self._nbytes):
                    yield self.memory[start : start + nbytes]
                    return
                oldest = self._pieces[0].copy
            wait(oldest)
            self.land(oldest)

    def take(self, nbytes: int, copy: Any, land: Callable[[], object]) -> None:
        """A copy of so many bytes was begun, to or from the `room` for them."""
        self._pieces.append(_Piece(self._end, copy, land))
        self._end += -(-nbytes // ALIGNMENT) * ALIGNMENT

    def land_all(self) -> None:
        """All copies have ended."""
        with self._lock:
            while self._pieces:
                self._pieces.popleft().land()

    def land(self, copy: Any) -> None:
        """This copy has ended, and so have those before it. One that has landed is no piece any more."""
        with self._lock:
            if any(piece.copy is copy for piece in self._pieces):
                landed = None
                while landed is not copy:
                    piece = self._pieces.popleft()
                    piece.land()
                    landed = piece.copy
