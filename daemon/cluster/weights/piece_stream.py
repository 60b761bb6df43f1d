"""Pieces of a shard, fetched from several sources at once, ahead of whoever takes them one after the other.

Each source has a thread, and several questions under way, so the link never waits for the disk on either side. A
fixed number of buffers bounds what may have arrived and not been taken. Does not know what is in a piece.

The head's channels take pieces strictly in order. A lender, a source that has only some, takes the next ones that it
has, in buffers of its own. What it does not bring is asked of the head. A lender is worth what it saves: each of its
pieces earns it the time that the head takes for one, and it spends what the reader waits for it. One that has spent
`LENDER_PATIENCE_S` more than it earned is not asked any more.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from shoal.comm.errors import CommError
from shoal.comm.group.errors import ChannelError
from shoal.daemon.errors import DaemonError
from shoal.kernels.arrays import Bytes
from shoal.models.checkpoint.weight_source import Piece

from .piece_sources import PieceSource
from .weight_messages import ANSWER_S, PIECE_BYTES

UNDER_WAY = 4  # questions to a source that are not answered yet
SPARE = 4  # buffers beyond those that the head's questions under way need
LENT = 8  # buffers that a lender may fill
LOOK_AHEAD = 64  # pieces among which a lender finds some
LENDER_PATIENCE_S = 2.0
LENDER_LOOK_S = 0.2  # between two looks at the lender that is waited for
RECENT = 8  # pieces of the head that its pace is the mean of

T = TypeVar("T")

log = logging.getLogger("shoal.cluster")


class _Place(NamedTuple):
    """A piece, and its place in all that was ever expected."""

    number: int
    piece: Piece


class _Asked(NamedTuple):
    place: _Place
    memory: Bytes
    nbytes: int


class _Asker:
    """Who fills at most `limit` buffers: all channels to the head together, or a lender.

    held: buffers that it has filled or asked for.  balance_s: what a lender has earned and not spent.  ended: the head
    has a lender's buffers, as soon as they are free.
    """

    def __init__(self, limit: int, lender: PieceSource | None = None) -> None:
        self.limit = limit
        self.lender = lender
        self.ended = False
        self.held = 0
        self.balance_s = LENDER_PATIENCE_S

    def may_have(self, piece: Piece) -> bool:
        return self.lender is None or self.lender.has(piece)


class PieceStream:
    """Asks for pieces; `nbytes` gives the length of each. `head`: its sources that have all of them. The sources are
    its own until `close`: the head's are closed, too, when a fetch has failed or is closed before everything expected
    was taken. lent_bytes: of what was taken, those that lenders brought.

    Raises ChannelError where a channel to the head fails or brings other bytes than those that were asked for, and
    DaemonError where the head refuses.
    """

    def __init__(self, head: Sequence[PieceSource], nbytes: Callable[[Piece], int]) -> None:
        self.lent_bytes = 0
        self._head = head
        self._nbytes = nbytes
        self._changed = threading.Condition()
        self._coming: Iterator[Piece] = iter(())
        self._count = 0  # of places
        self._order: deque[_Place] = deque()  # looked at and not taken yet
        self._open: list[_Place] = []  # of these, asked of nobody
        self._lent: dict[int, _Asker] = {}  # asked of which lender
        self._arrived: dict[int, tuple[Bytes, int, _Asker]] = {}
        self._free: list[Bytes] = []
        self._first = _Asker(len(head) * UNDER_WAY + SPARE)
        self._under_way = 0  # at the head
        self._pace_s = 0.0  # that it takes for a piece
        self._failed: Exception | None = None
        self._closed = False
        self._lenders: list[PieceSource] = []
        self._threads = [self._started(self._run, source) for source in head]

    def lend(self, source: PieceSource) -> None:
        """Another source, which has some of what is wanted. It is closed when it fails, or is of no use."""
        with self._changed:
            if not self._closed:
                self._lenders.append(source)
                self._threads.append(self._started(self._run_lender, source))
                return
        source.close()

    def expect(self, pieces: Iterable[Piece]) -> None:
        """These will be taken next, in this order. What was expected before is forgotten."""
        with self._changed:
            for memory, _, asker in self._arrived.values():
                self._give_back(memory, asker)
            for known in (self._arrived, self._lent, self._order, self._open):
                known.clear()
            self._coming = iter(pieces)
            self._look(1)
            self._changed.notify_all()

    def look(self) -> None:
        """Look at what is expected, up to a piece that nobody was asked for, if there is one."""
        with self._changed:
            self._look(1)

    def take(self, piece: Piece, into: Bytes) -> None:
        """Waits for the piece that was expected next and copies it to `into`, uint8 (n,)."""
        with self._changed:
            self._look(1)
            number, next_piece = self._order[0]
            assert next_piece == piece, f"{next_piece} was to be taken before {piece}"
            while number not in self._arrived:
                if self._failed is not None:
                    raise self._failed
                if self._closed:
                    raise ChannelError("the weights are not fetched any more")
                began_s = time.monotonic()
                self._changed.wait(LENDER_LOOK_S)
                if (asker := self._lent.get(number)) is not None and asker.lender is not None:
                    asker.balance_s -= time.monotonic() - began_s
                    if asker.balance_s < 0:
                        asker.lender.close()  # its thread gives back what was asked of it
            memory, nbytes, asker = self._arrived.pop(number)
            self._order.popleft()
            self.lent_bytes += nbytes if asker.lender is not None else 0
        into[:] = memory[:nbytes]
        with self._changed:
            self._give_back(memory, asker)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads. Idempotent."""
        with self._changed:
            self._closed = True
            pending = self._under_way or self._failed is not None
            lenders = list(self._lenders)
            self._changed.notify_all()
        for source in (*(self._head if pending else ()), *lenders):
            source.close()
        for thread in self._threads:
            thread.join(ANSWER_S)

    def _started(self, run: Callable[[T], None], source: T) -> threading.Thread:
        thread = threading.Thread(target=run, args=(source,), name="weights", daemon=True)
        thread.start()
        return thread

    def _run(self, source: PieceSource) -> None:
        try:
            self._ask(source, self._first, deque())
        except Exception as error:  # whoever takes pieces gets it
            with self._changed:
                self._failed = self._failed or error
                self._changed.notify_all()

    def _run_lender(self, source: PieceSource) -> None:
        asker, asked = _Asker(LENT, source), deque[_Asked]()
        try:
            self._ask(source, asker, asked)
        except (CommError, OSError, DaemonError) as error:
            if not self._closed:
                log.info("another worker is not asked for weights any more: %s", error)
        except Exception:
            log.exception("another worker is not asked for weights any more")
        source.close()
        with self._changed:
            asker.ended = True
            self._first.limit += LENT - asker.held  # so there is always room for what the head is asked for
            for it in asked:
                self._give_back(it.memory, asker)
                if self._lent.pop(it.place.number, None) is not None:
                    insort(self._open, it.place)
            self._changed.notify_all()

    def _ask(self, source: PieceSource, asker: _Asker, asked: deque[_Asked]) -> None:
        """Until nothing is wanted any more. `asked`: what is under way."""
        while (new := self._deal(asker, UNDER_WAY - len(asked), wait=not asked)) is not None:
            asked += new
            for it in new:
                source.ask(it.place.piece)
            began_s, first = time.monotonic(), asked[0]
            source.receive(first.place.piece, first.memory[: first.nbytes])
            asked.popleft()
            self._keep(first, asker, time.monotonic() - began_s)

    def _deal(self, asker: _Asker, most: int, *, wait: bool) -> list[_Asked] | None:
        """Up to `most` of the pieces that come next, as many as there are buffers for; at least one if it may `wait`.
        None when nothing is wanted any more."""
        with self._changed:
            while not self._closed and self._failed is None:
                dealt: list[_Asked] = []
                while len(dealt) < most and (asked := self._one(asker)) is not None:
                    dealt.append(asked)
                if dealt or not wait:
                    return dealt
                self._changed.wait()
            return None

    def _one(self, asker: _Asker) -> _Asked | None:
        """The next piece to be asked for, and where it goes."""
        if asker.held >= asker.limit:
            return None
        self._look(1 if asker.lender is None else LOOK_AHEAD)
        place = next((it for it in self._open if asker.may_have(it.piece)), None)
        if place is None:
            return None
        self._open.remove(place)
        asker.held += 1
        if asker.lender is None:
            self._under_way += 1
        else:
            self._lent[place.number] = asker
        nbytes = self._nbytes(place.piece)
        return _Asked(place, self._buffer(nbytes), nbytes)

    def _look(self, count: int) -> None:
        """Have so many pieces to choose from, if there are that many."""
        while len(self._open) < count and (piece := next(self._coming, None)) is not None:
            place = _Place(self._count, piece)
            self._count += 1
            self._order.append(place)
            self._open.append(place)

    def _keep(self, it: _Asked, asker: _Asker, took_s: float) -> None:
        number = it.place.number
        with self._changed:
            if asker.lender is None:
                self._under_way -= 1
                pace_s = took_s / len(self._head)
                self._pace_s += (pace_s - self._pace_s) / RECENT if self._pace_s else pace_s
            else:
                self._lent.pop(number, None)
                asker.balance_s = min(LENDER_PATIENCE_S, asker.balance_s + self._pace_s)
            if self._order and number >= self._order[0].number:
                self._arrived[number] = it.memory, it.nbytes, asker
            else:  # it is expected no more
                self._give_back(it.memory, asker)
            self._changed.notify_all()

    def _give_back(self, memory: Bytes, asker: _Asker) -> None:
        self._free.append(memory)
        asker.held -= 1
        if asker.ended:
            self._first.limit += 1

    def _buffer(self, nbytes: int) -> Bytes:
        """Memory for a piece, uint8 (at least `nbytes`,)."""
        memory = self._free.pop() if self._free else np.empty(max(nbytes, PIECE_BYTES), np.uint8)
        return memory if len(memory) >= nbytes else np.empty(nbytes, np.uint8)
