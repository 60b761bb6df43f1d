"""Helper: the two ends of a stream between ranks, over a socket pair without encryption."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable


class PairStream:
    """One end. Closing either end wakes whoever waits at the other. `most`: how many bytes the next call may move at
    most, when it does not wait; by default as many as there are."""

    buffered = unsent = False
    room_event = select.POLLOUT

    def __init__(self, end: socket.socket, most: Callable[[], int] | None = None) -> None:
        self._end = end
        self._most = most
        self.closed = False

    def fileno(self) -> int:
        return self._end.fileno()

    def watch(self) -> None: ...

    def ready(self, data: bool, room: bool) -> bool:
        return False

    def send(self, *buffers: memoryview | bytes | bytearray) -> None:
        self._end.settimeout(None)
        self._end.sendall(b"".join(buffers))

    def send_some(self, data: memoryview) -> int:
        if not data:
            return 0
        try:
            self._end.settimeout(0)
            return self._end.send(self._cut(data))
        except BlockingIOError:
            return 0

    def receive_some(self, view: memoryview) -> int:
        try:
            self._end.settimeout(0)
            got = self._end.recv_into(self._cut(view))
        except BlockingIOError:
            return 0
        if not got:
            raise ConnectionError("the other end is closed")
        return got

    def receive_into(self, view: memoryview, timeout_s: float) -> None:
        self._end.settimeout(timeout_s)
        view = view.cast("B")
        while view.nbytes:
            got = self._end.recv_into(view)
            if not got:
                raise ConnectionError("the other end is closed")
            view = view[got:]

    def end(self) -> None:
        """As if the process at this end were gone. From any thread."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.closed = True
        self._end.close()

    def _cut(self, view: memoryview) -> memoryview:
        return view if self._most is None else view[: max(1, self._most())]


def stream_pair(
    most: Callable[[], int] | None = None, buffer_bytes: int = 0
) -> tuple[PairStream, PairStream]:
    """`buffer_bytes`: that the system keeps of what was sent, about; 0 = as many as it likes."""
    ends = socket.socketpair()
    if buffer_bytes:
        for end in ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    return PairStream(ends[0], most), PairStream(ends[1], most)
