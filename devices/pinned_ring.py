"""Page-locked memory of the host that the copies of one queue pass through, round and round.

A driver copies memory that the system may move only by way of memory of its own, while the caller waits. Page-locked
memory it copies by itself. Weights lie in the other kind, so their packets pass through pieces of this one. A queue
does one thing after the other, so pieces become free in the order in which they were taken.

Knows places and whose turn it is; not what is copied, nor how.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

ALIGNMENT = 256  # of pieces, in bytes


class _Piece(NamedTuple):
    """`begin`: in bytes since the first one. `land` waits for the end of `copy`, and takes what came."""

    begin: int
    copy: object
    land: Callable[[], None]


class PinnedRing:
    """`nbytes` of memory, a multiple of ALIGNMENT. Not thread-safe."""

    def __init__(self, nbytes: int) -> None:
        assert nbytes % ALIGNMENT == 0, "pieces begin at multiples"
        self.nbytes = nbytes
        self._end = 0  # of the last piece, in bytes since the first one
        self._pieces: deque[_Piece] = deque()

    def place(self, nbytes: int) -> int:
        """Where the next piece, of so many bytes, begins. Whoever had these bytes before has landed."""
        assert nbytes <= self.nbytes, "a packet is larger than the ring"
        start = self._end % self.nbytes
        if start + nbytes > self.nbytes:
            self._end += self.nbytes - start
            start = 0
        while self._pieces and self._end + nbytes - self._pieces[0].begin > self.nbytes:
            self._pieces.popleft().land()
        return start

    def take(self, nbytes: int, copy: object, land: Callable[[], None]) -> None:
        """A copy of so many bytes was begun, to or from where `place` said."""
        self._pieces.append(_Piece(self._end, copy, land))
        self._end += -(-nbytes // ALIGNMENT) * ALIGNMENT

    def land_all(self) -> None:
        """All copies have ended."""
        while self._pieces:
            self._pieces.popleft().land()

    def land(self, copy: object) -> None:
        """This copy has ended, and so have those before it. One that has landed is no piece any more."""
        if any(piece.copy is copy for piece in self._pieces):
            landed = None
            while landed is not copy:
                piece = self._pieces.popleft()
                piece.land()
                landed = piece.copy
