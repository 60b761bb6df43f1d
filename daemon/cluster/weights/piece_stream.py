"""Pieces of a shard, fetched over several channels at once, ahead of whoever takes them one after the other.

Each channel has a thread, and several questions under way, so the link never waits for the disk on either side. A
fixed number of buffers bounds what may have arrived and not been taken. Does not know what is in a piece.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from shoal.comm.group.channel import Channel
from shoal.comm.group.errors import ChannelError
from shoal.daemon.errors import DaemonError
from shoal.kernels.arrays import Bytes
from shoal.models.checkpoint.weight_source import Piece
from shoal.offload.pack.pack import checksum

from .weight_messages import ANSWER_BYTES, ANSWER_S, PIECE_BYTES, PieceFollows, Refused, WantPiece

UNDER_WAY = 4  # questions on a channel that are not answered yet
SPARE = 4  # buffers beyond those that questions under way need


class _Asked(NamedTuple):
    piece: Piece
    memory: Bytes
    nbytes: int
    turn: int


class PieceStream:
    """Asks for pieces of `content`; `nbytes` gives the length of each. The channels are its own until `close`: when a
    fetch has failed or is closed before everything expected was taken, they are closed, too.

    Raises ChannelError where a channel fails or brings other bytes than those that were asked for, and DaemonError
    where the head refuses.
    """

    def __init__(self, channels: Sequence[Channel], content: str, nbytes: Callable[[Piece], int]) -> None:
        self._channels = channels
        self._content = content
        self._nbytes = nbytes
        self._changed = threading.Condition()
        self._coming: Iterator[Piece] = iter(())
        self._next: Piece | None = None  # of `_coming`
        self._order: deque[Piece] = deque()  # asked for and not taken yet
        self._arrived: dict[Piece, tuple[Bytes, int]] = {}
        self._turn = 0  # pieces that an earlier `expect` has asked for are dropped
        self._free: list[Bytes] = []
        self._buffers = len(channels) * UNDER_WAY + SPARE  # that may still be made
        self._under_way = 0
        self._failed: Exception | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(channel,), name="weights", daemon=True)
            for channel in channels
        ]
        for thread in self._threads:
            thread.start()

    def expect(self, pieces: Iterable[Piece]) -> None:
        """These will be taken next, in this order. What was expected before is forgotten."""
        with self._changed:
            self._turn += 1
            self._free += [memory for memory, _ in self._arrived.values()]
            self._arrived.clear()
            self._order.clear()
            self._coming = iter(pieces)
            self._next = next(self._coming, None)
            self._changed.notify_all()

    def expects(self, piece: Piece) -> bool:
        """Whether it is the one to be taken next."""
        with self._changed:
            return piece == (self._order[0] if self._order else self._next)

    def take(self, piece: Piece, into: Bytes) -> None:
        """Waits for the piece that was expected next and copies it to `into`, uint8 (n,)."""
        with self._changed:
            while piece not in self._arrived:
                if self._failed is not None:
                    raise self._failed
                if self._closed:
                    raise ChannelError("the weights are not fetched any more")
                self._changed.wait()
            memory, nbytes = self._arrived.pop(piece)
            taken = self._order.popleft()
            assert taken == piece, f"{taken} was to be taken before {piece}"
        into[:] = memory[:nbytes]
        self._release(memory)

    def close(self) -> None:
        """Ends the threads. Idempotent."""
        with self._changed:
            self._closed = True
            pending = self._under_way or self._failed is not None
            self._changed.notify_all()
        if pending:
            for channel in self._channels:
                channel.close()
        for thread in self._threads:
            thread.join(ANSWER_S)

    def _run(self, channel: Channel) -> None:
        asked: deque[_Asked] = deque()
        try:
            while (new := self._deal(UNDER_WAY - len(asked), wait=not asked)) is not None:
                for it in new:
                    channel.send_message(WantPiece(self._content, *it.piece))
                asked += new
                self._receive(channel, asked.popleft())
        except Exception as error:  # whoever takes pieces gets it
            with self._changed:
                self._failed = self._failed or error
                self._changed.notify_all()

    def _deal(self, most: int, *, wait: bool) -> list[_Asked] | None:
        """Up to `most` of the pieces that come next, as many as there are buffers for; at least one if it may `wait`.
        None when nothing is wanted any more."""
        with self._changed:
            while not self._closed and self._failed is None:
                dealt: list[_Asked] = []
                while len(dealt) < most and (piece := self._next) is not None:
                    nbytes = self._nbytes(piece)
                    memory = self._buffer(nbytes)
                    if memory is None:
                        break
                    self._order.append(piece)
                    self._next = next(self._coming, None)
                    dealt.append(_Asked(piece, memory, nbytes, self._turn))
                self._under_way += len(dealt)
                if dealt or not wait:
                    return dealt
                self._changed.wait()
            return None

    def _receive(self, channel: Channel, asked: _Asked) -> None:
        answer: PieceFollows | Refused = channel.receive_message(
            PieceFollows | Refused, ANSWER_S, ANSWER_BYTES
        )
        if isinstance(answer, Refused):
            raise DaemonError(answer.code, f"the head cannot send {asked.piece.block}: {answer.reason}")
        found = asked.memory[: asked.nbytes]
        channel.receive_into(found.data, ANSWER_S)
        if checksum(found) != answer.checksum:
            block, role, start, stop = asked.piece
            raise ChannelError(
                f"{role}[{start}:{stop}] of {block} was altered on its way: its checksum is wrong"
            )
        with self._changed:
            self._under_way -= 1
            if asked.turn == self._turn:
                self._arrived[asked.piece] = asked.memory, asked.nbytes
            else:
                self._free.append(asked.memory)
            self._changed.notify_all()

    def _buffer(self, nbytes: int) -> Bytes | None:
        """Memory for a piece, uint8 (at least `nbytes`,); None if all of it is in use."""
        if self._free:
            memory = self._free.pop()
            return memory if len(memory) >= nbytes else np.empty(nbytes, np.uint8)
        if not self._buffers:
            return None
        self._buffers -= 1
        return np.empty(max(nbytes, PIECE_BYTES), np.uint8)

    def _release(self, memory: Bytes) -> None:
        with self._changed:
            self._free.append(memory)
            self._changed.notify_all()
