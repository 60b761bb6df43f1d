"""Frames over one stream, sent and received as far as that goes without waiting, or with.

A frame that was begun is finished before the next, whatever happens between: so a stream never has half a frame in it,
though an order may be given up while one is on its way.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np

from .frames import HEADER, FrameKind, Header
from .wire_types import Octets

JOINED_BYTES = 64 << 10  # of a frame that go out together with its header
_NOTHING = memoryview(b"")


class FrameStream(Protocol):
    """A connection to one other rank. All calls raise ChannelError or OSError when it ends or takes too long."""

    @property
    def closed(self) -> bool:
        """Whether it has failed, or was closed here."""
        ...

    @property
    def buffered(self) -> bool:
        """Whether something may have come that a `poll` on `fileno` does not see."""
        ...

    @property
    def unsent(self) -> bool:
        """Whether `send_some` has taken bytes that are still here."""
        ...

    def fileno(self) -> int: ...

    @property
    def room_event(self) -> int:
        """What `poll` says of `fileno` when `send_some` may take more again."""
        ...

    def ready(self, data: bool, room: bool) -> bool:
        """Whether what one wants is there, something to read or room for `send_some`, though `poll` may not say so.
        Otherwise it will."""
        ...

    def watch(self) -> None:
        """From now on, look for bytes for a while before a thread sleeps until they come."""
        ...

    def send_some(self, data: memoryview) -> int:
        """What goes without waiting, after what was taken before: how many bytes of `data` were taken."""
        ...

    def receive_some(self, view: memoryview) -> int:
        """What is there, into `view`: how many bytes. Does not wait."""
        ...

    def receive_into(self, view: memoryview, timeout_s: float) -> None:
        """Fills the whole of `view`."""
        ...


class Framed:
    """See above. One frame at a time comes in: its `header`, once that is complete, then its payload, once it is
    decided where to (`accept`)."""

    def __init__(self, stream: FrameStream, epoch: int) -> None:
        self.stream = stream
        self._epoch = epoch
        self._raw = bytearray(HEADER.size)
        self._head = memoryview(self._raw)
        self._got = 0  # of the header
        self.header: Header | None = None
        self._rest: memoryview | None = None  # of the payload, that is to be filled
        self._outgoing: deque[list[memoryview]] = deque()  # frames, the first of which may be begun
        self._begun = False
        self.pushed = 0  # bytes that have gone by `push`

    # --- out ------------------------------------------------------------------------------------------------

    def begin(self, kind: FrameKind, number: int, place: int, payload: Octets | bytes = b"") -> None:
        """Send a frame as far as `push` goes. The payload must stay as it is until then, or until `interrupt`."""
        data = memoryview(payload.data if isinstance(payload, np.ndarray) else payload).cast("B")
        head = HEADER.pack(kind, self._epoch, number, place, len(data))
        frame = [memoryview(b"".join((head, data[:JOINED_BYTES])))]
        if len(data) > JOINED_BYTES:
            frame.append(data[JOINED_BYTES:])
        self._outgoing.append(frame)

    def send(self, kind: FrameKind, number: int, place: int, payload: Octets) -> bool:
        """Begin a frame and push. As fast as can be where nothing is in the way, which is nearly always."""
        if self._outgoing or len(payload) > JOINED_BYTES:
            self.begin(kind, number, place, payload)
            return self.push()
        head = HEADER.pack(kind, self._epoch, number, place, len(payload))
        frame = memoryview(b"".join((head, payload.data)))
        sent = self.stream.send_some(frame)
        if sent < len(frame):
            self._outgoing.append([frame[sent:]])
            self._begun = sent > 0
            return False
        return not self.stream.unsent

    def push(self) -> bool:
        """Send what goes without waiting; whether everything has gone."""
        while self._outgoing:
            frame = self._outgoing[0]
            while frame:
                sent = self.stream.send_some(frame[0])
                self.pushed += sent
                self._begun |= sent > 0
                if sent < len(frame[0]):
                    frame[0] = frame[0][sent:]
                    return False
                del frame[0]
            self._outgoing.popleft()
            self._begun = False
        if self.stream.unsent:
            self.stream.send_some(_NOTHING)
        return not self.stream.unsent

    # --- in -------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether there may be more to read than a `poll` sees."""
        return self.header is not None or self.stream.buffered

    @property
    def accepted(self) -> bool:
        """Whether it is decided where the payload goes."""
        return self._rest is not None

    def header_some(self) -> bool:
        """Whether the header is there. Does not wait."""
        while self._got < HEADER.size:
            if not (count := self.stream.receive_some(self._head[self._got :])):
                return False
            self._got += count
        if self.header is None:
            self.header = Header.of(self._head)
        return True

    def accept(self, into: Octets) -> None:
        """The payload goes there."""
        self._rest = into.data

    def payload_some(self) -> bool:
        """Whether the payload is there. Does not wait."""
        assert self._rest is not None
        while self._rest:
            if not (count := self.stream.receive_some(self._rest)):
                return False
            self._rest = self._rest[count:]
        return True

    def receive(self, kind: FrameKind, number: int, place: int, into: Octets, timeout_s: float) -> bool:
        """Wait for a frame and take it if it is this one; otherwise its header is there. As fast as can be."""
        if self._got:
            return False
        self.stream.receive_into(self._head, timeout_s)
        if self._raw != HEADER.pack(kind, self._epoch, number, place, len(into)):
            self._got = HEADER.size
            return False
        if len(into):
            self.stream.receive_into(into.data, timeout_s)
        return True

    def await_header(self, timeout_s: float) -> Header:
        if self._got < HEADER.size:
            self.stream.receive_into(self._head[self._got :], timeout_s)
            self._got = HEADER.size
        if self.header is None:
            self.header = Header.of(self._head)
        return self.header

    def await_payload(self, timeout_s: float) -> None:
        assert self._rest is not None
        if self._rest:
            self.stream.receive_into(self._rest, timeout_s)
            self._rest = _NOTHING

    def finish(self) -> Header:
        """The frame is there: the next may come."""
        header, self.header, self._rest, self._got = self.header, None, None, 0
        assert header is not None
        return header

    def interrupt(self, *, incoming: bool = True) -> None:
        """What the caller gave for payloads is used no more; for one that is coming in only if `incoming`. Frames that
        were not begun are not sent."""
        kept = [memoryview(bytes(piece)) for piece in self._outgoing[0]] if self._begun else None
        self._outgoing = deque([kept] if kept is not None else [])
        if self._rest and incoming:
            self._rest = memoryview(bytearray(len(self._rest)))
