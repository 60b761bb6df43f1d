"""Helper: the two ends of a stream between ranks, over a socket pair without encryption."""

from __future__ import annotations

import socket


class PairStream:
    """One end. Closing either end wakes whoever waits at the other."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, *buffers: memoryview | bytes | bytearray) -> None:
        self._end.sendall(b"".join(buffers))

    def receive_into(self, view: memoryview, timeout_s: float) -> None:
        self._end.settimeout(timeout_s)
        view = view.cast("B")
        while view.nbytes:
            got = self._end.recv_into(view)
            if not got:
                raise ConnectionError("the other end is closed")
            view = view[got:]

    def close(self) -> None:
        self._end.close()


def stream_pair() -> tuple[PairStream, PairStream]:
    one, other = socket.socketpair()
    return PairStream(one), PairStream(other)
