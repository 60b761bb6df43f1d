"""A star: rank 0, the hub, exchanges frames with every other rank, a spoke each; spokes do not talk to each other.

A sum is one round trip. Every spoke sends its partial; the hub adds them to its own in the order of ranks and sends the
sum to all, so that all have the same bits. Orders and giving them up travel on the same channels. The hub alone begins
and ends an order. A spoke that fails says so in place of a partial.

Knows arrays of f32 and frames; not what is computed, nor who is at the other end. One thread uses a hub or a spoke.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..errors import ChannelError, ChannelTimeout
from .frames import HEADER, MAX_ORDER_BYTES, MAX_REASON_BYTES, WRAP, FrameKind, Header
from .part_waits import PartWaits
from .star_errors import Departed, GivenUp
from .wire_types import F32Rows, Octets, WireType, decode, encode, wire_bytes


class FrameStream(Protocol):
    """A connection to one other rank. Both calls raise ChannelError when it ends or takes too long."""

    def send(self, *buffers: memoryview | bytes | bytearray) -> None:
        """One message: all buffers, one behind the other."""
        ...

    def receive_into(self, view: memoryview, timeout_s: float) -> None:
        """Fills the whole of `view`."""
        ...


class Framed:
    """Framed over one stream, with memory that is used again and again."""

    def __init__(self, stream: FrameStream, epoch: int) -> None:
        self._stream = stream
        self.epoch = epoch
        self._head = bytearray(HEADER.size)

    def send(self, kind: FrameKind, number: int, place: int, payload: Octets | bytes = b"") -> None:
        data = memoryview(payload.data if isinstance(payload, np.ndarray) else payload).cast("B")
        header = Header(kind, self.epoch, number, place, data.nbytes)
        self._stream.send(header.packed(), data)

    def receive(self, timeout_s: float) -> Header:
        self._stream.receive_into(memoryview(self._head), timeout_s)
        return Header.of(self._head)

    def payload(self, into: Octets, timeout_s: float) -> None:
        self._stream.receive_into(into.data, timeout_s)

    def skip(self, nbytes: int, most: int, timeout_s: float) -> None:
        """Passes over a payload of at most `most` bytes."""
        if nbytes > most:
            raise ChannelError(f"a frame of {nbytes} bytes: at most {most} were to come")
        room = np.empty(min(nbytes, 1 << 20), np.uint8)
        while nbytes:
            part = room[: min(nbytes, len(room))]
            self.payload(part, timeout_s)
            nbytes -= len(part)


class _Room:
    """Memory for the payload of one frame, which grows to the largest that came."""

    def __init__(self) -> None:
        self._bytes: Octets = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> Octets:
        if len(self._bytes) < nbytes:
            self._bytes = np.empty(nbytes, np.uint8)
        return self._bytes[:nbytes]


class Hub:
    """Rank 0's side. `streams` lead to ranks 1, 2, …; a rank that does not answer within `patience_s` has departed.

    Raises Departed, with the rank, when a spoke failed or its stream ended; the hub can be used no more after that.
    """

    def __init__(
        self, streams: Sequence[FrameStream], epoch: int, wire: WireType = "f32", patience_s: float = 60.0
    ) -> None:
        self._spokes = [Framed(stream, epoch) for stream in streams]
        self.waits = [PartWaits() for _ in streams]  # for parts of ranks 1, 2, …, in this order
        self._wire = wire
        self._patience_s = patience_s
        self._number = 0
        self._place = 0
        self._open = False
        self.awaited: dict[int, float] = {}  # ranks that this one waits for just now, and since when
        self._largest = MAX_REASON_BYTES  # payload that may still come of an order that was given up
        self._room = _Room()

    def begin(self, order: bytes) -> None:
        """Hands an order to all others."""
        self._number = (self._number + 1) % WRAP
        self._place = 0
        self._open = True
        self._tell(FrameKind.ORDER, order)

    def end(self) -> None:
        """The order is carried out."""
        self._open = False

    def give_up(self) -> None:
        """Nobody goes on with the order. Does nothing if none is under way; a spoke that departed is found later."""
        if not self._open:
            return
        self._open = False
        for rank, spoke in enumerate(self._spokes, 1):
            self.awaited = {rank: time.monotonic()}
            try:
                spoke.send(FrameKind.GIVE_UP, self._number, self._place)
            except (OSError, ChannelError):
                continue
        self.awaited = {}

    def broadcast(self, rows: F32Rows | None, shape: tuple[int, int]) -> F32Rows:
        """Rows (T, n) that only this rank has; all get the same bits, exactly."""
        assert rows is not None
        # The others may bring partials of as many numbers before this rank does, and it may give up until then.
        self._largest = max(self._largest, 4 * shape[0] * shape[1])
        self._tell(FrameKind.ROWS, np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        self._place += 1
        return rows

    def allreduce(self, partial: F32Rows) -> F32Rows:
        """The sum (T, n) of all partials, as the wire rounds it."""
        shape = partial.shape
        nbytes = wire_bytes(self._wire, shape)
        total = partial.astype(np.float32, copy=True)
        theirs = np.empty(shape, np.float32)
        for rank, spoke in enumerate(self._spokes, 1):
            decode(self._wire, self._part(rank, spoke, nbytes), theirs)
            total += theirs
        data = self._room.take(nbytes)
        encode(self._wire, total, data)
        self._tell(FrameKind.SUM, data)
        self._place += 1
        if self._wire != "f32":
            decode(self._wire, data, total)
        return total

    def gather(self, columns: F32Rows) -> F32Rows:
        """Columns (R, n) of all ranks side by side. Every rank has its own number of them, which it says."""
        brought = [columns]
        for rank, spoke in enumerate(self._spokes, 1):
            data = self._part(rank, spoke, None, row_bytes=4 * len(columns))
            brought.append(data.copy().view(np.float32).reshape(len(columns), -1))
        self._place += 1
        return np.concatenate(brought, axis=1)

    def _tell(self, kind: FrameKind, payload: Octets | bytes) -> None:
        for rank, spoke in enumerate(self._spokes, 1):
            self.awaited = {rank: time.monotonic()}
            try:
                spoke.send(kind, self._number, self._place, payload)
            except (OSError, ChannelError) as error:
                raise Departed(rank, str(error)) from error
        self.awaited = {}

    def _part(self, rank: int, spoke: Framed, nbytes: int | None, row_bytes: int = 0) -> Octets:
        """The payload of a spoke's next frame of this order; what is left of older orders is passed over."""
        began_s = time.perf_counter()
        ends_s = 0.0  # once something of an older order came
        self.awaited = {rank: time.monotonic()}
        try:
            while True:
                header = spoke.receive(self._patience_s)
                if header.epoch != spoke.epoch:
                    raise ChannelError(f"epoch {header.epoch} came, this is {spoke.epoch}")
                if header.kind not in (FrameKind.PART, FrameKind.FAILED):
                    raise ChannelError(f"a frame {header}: a part was to come")
                current = (header.epoch, header.number) == (spoke.epoch, self._number)
                if header.kind == FrameKind.FAILED and current:
                    why = self._room.take(min(header.nbytes, MAX_REASON_BYTES))
                    spoke.payload(why, self._patience_s)
                    raise Departed(rank, why.tobytes().decode("utf-8", "replace"), failed=True)
                if not current:
                    ends_s = ends_s or time.monotonic() + self._patience_s
                    if time.monotonic() > ends_s:
                        raise ChannelError(f"only parts of older orders came for {self._patience_s:.0f} s")
                    spoke.skip(header.nbytes, self._largest, self._patience_s)
                    continue
                if header.place != self._place:
                    raise ChannelError(f"exchange {header.place} came, {self._place} was to come")
                if nbytes is None:
                    if row_bytes and (header.nbytes % row_bytes or header.nbytes > row_bytes * MAX_COLUMNS):
                        raise ChannelError(f"columns of {header.nbytes} bytes in rows of {row_bytes}")
                    nbytes = header.nbytes
                elif header.nbytes != nbytes:
                    raise ChannelError(f"a part of {header.nbytes} bytes: {nbytes} were to come")
                self._largest = max(self._largest, nbytes)
                data = self._room.take(nbytes)
                spoke.payload(data, self._patience_s)
                self.waits[rank - 1].note(time.perf_counter() - began_s, nbytes)
                self.awaited = {}
                return data
        except (OSError, ChannelError) as error:
            raise Departed(rank, str(error)) from error


MAX_COLUMNS = 1 << 22


class Spoke:
    """Another rank's side. Raises GivenUp when the hub gives the order up, and Departed when the hub is gone."""

    def __init__(
        self, stream: FrameStream, epoch: int, wire: WireType = "f32", patience_s: float = 600.0
    ) -> None:
        self._hub = Framed(stream, epoch)
        self._wire = wire
        self._patience_s = patience_s
        self._number = 0
        self._place = 0
        self._room = _Room()

    def next(self) -> bytes:
        """Waits for the next order."""
        try:
            while True:
                header = self._awaited()
                if header.epoch != self._hub.epoch:
                    raise ChannelError(f"epoch {header.epoch} came, this is {self._hub.epoch}")
                if header.kind == FrameKind.GIVE_UP and not header.nbytes:
                    continue  # it came after this rank was done with the order
                if header.kind != FrameKind.ORDER or header.nbytes > MAX_ORDER_BYTES:
                    raise ChannelError(f"a frame {header}: an order was to come")
                self._number, self._place = header.number, 0
                data = np.empty(header.nbytes, np.uint8)
                self._hub.payload(data, self._patience_s)
                return data.tobytes()
        except (OSError, ChannelError) as error:
            raise Departed(0, str(error)) from error

    def _awaited(self) -> Header:
        """The next header, however long the hub has nothing to do."""
        while True:
            try:
                return self._hub.receive(self._patience_s)
            except ChannelTimeout:  # nothing has come; whether the hub is alive is somebody else's concern
                continue

    def broadcast(self, rows: F32Rows | None, shape: tuple[int, int]) -> F32Rows:
        """The rows (T, n) of rank 0."""
        result = np.empty(shape, np.float32)
        self._receive(FrameKind.ROWS, result.reshape(-1).view(np.uint8))
        return result

    def allreduce(self, partial: F32Rows) -> F32Rows:
        """The sum (T, n) of all partials."""
        nbytes = wire_bytes(self._wire, partial.shape)
        data = self._room.take(nbytes)
        encode(self._wire, partial, data)
        self._send(FrameKind.PART, data)
        self._receive(FrameKind.SUM, data)
        total = np.empty(partial.shape, np.float32)
        decode(self._wire, data, total)
        return total

    def gather(self, columns: F32Rows) -> F32Rows:
        """Sends the columns (R, n). → (R, 0)"""
        self._send(FrameKind.PART, np.ascontiguousarray(columns).reshape(-1).view(np.uint8))
        self._place += 1
        return columns[:, :0]

    def fail(self, reason: str) -> None:
        """This rank cannot go on with the order."""
        self._send(FrameKind.FAILED, reason.encode()[:MAX_REASON_BYTES])

    def _send(self, kind: FrameKind, payload: Octets | bytes) -> None:
        try:
            self._hub.send(kind, self._number, self._place, payload)
        except (OSError, ChannelError) as error:
            raise Departed(0, str(error)) from error

    def _receive(self, kind: FrameKind, into: Octets) -> None:
        """The payload of the hub's next frame, which must be this one."""
        try:
            header = self._hub.receive(self._patience_s)
            due = Header(kind, self._hub.epoch, self._number, self._place, len(into))
            if header == due._replace(kind=FrameKind.GIVE_UP, place=header.place, nbytes=0):
                raise GivenUp
            if header != due:
                raise ChannelError(f"a frame {header}: {due} was to come")
            self._hub.payload(into, self._patience_s)
        except (OSError, ChannelError) as error:
            raise Departed(0, str(error)) from error
        self._place += 1
