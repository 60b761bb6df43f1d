"""A connection as a stream of bytes with deadlines, in the clear (for tests) or in TLS 1.3.

One thread may send while another receives. TLS runs in memory (`ssl.MemoryBIO`) and the socket beside it: so a
message is one `send` however many records it has, what came is read in one go, and no thread waits for the network
while it keeps another from OpenSSL, whose objects serve one thread at a time. On loopback this takes a third off the
round trip of `ssl.SSLSocket`. Deadlines are those of `time.monotonic`.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import ssl
import threading
import time
from typing import Protocol

from .errors import ChannelError, ChannelTimeout, NotPaired

Address = tuple[str, int]  # host and port

TAKE_BYTES = 128 << 10  # taken from the socket at a time
PARTING_READS = 8
SEAL_BYTES = 256 << 10  # given to TLS, and then to the socket, at a time

# Linux; elsewhere the default of the system holds. A peer that is gone is noticed by the group much earlier.
_OPTIONS = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}


class Stream(Protocol):
    """What a channel needs."""

    @property
    def closed(self) -> bool: ...

    @property
    def buffered(self) -> bool:
        """Whether `receive` would return without looking at the socket."""

    def fileno(self) -> int: ...

    def ends(self) -> tuple[Address, Address]:
        """Host and port of the other side, and of this one."""

    def send(self, data: memoryview, deadline: float) -> None:
        """All of `data`. ChannelTimeout, ChannelError."""

    def receive(self, view: memoryview, deadline: float) -> int:
        """Into `view`, at least one byte; how many. ChannelTimeout when there was none, ChannelError at the end."""

    def abort(self) -> None:
        """Wake whoever waits. Nothing can be sent or received any more, but the descriptor is still there."""

    def close(self) -> None:
        """Free the descriptor, after `abort` and when nobody else uses the stream."""


class SocketStream:
    """A connected stream socket, TCP or of a pair."""

    buffered = False

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _OPTIONS.items():
                if option := getattr(socket, name, None):
                    connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket = connected
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connected, select.POLLIN)
        self._writable.register(connected, select.POLLOUT)
        self.closed = False

    def connect(self, target: tuple[str | int, ...], deadline: float) -> None:
        """To a socket address; for a stream whose socket is not connected. ChannelTimeout, ChannelError."""
        problem = self._socket.connect_ex(target)
        if problem == errno.EINPROGRESS:
            self._wait(self._writable, deadline, "no answer")
            problem = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            raise self._broken(OSError(problem, os.strerror(problem)))

    def fileno(self) -> int:
        return self._socket.fileno()

    def ends(self) -> tuple[Address, Address]:
        try:
            return _address(self._socket.getpeername()), _address(self._socket.getsockname())
        except OSError as error:
            raise self._broken(error) from error

    def send(self, data: memoryview, deadline: float) -> None:
        while True:
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                self._wait(self._writable, deadline, "the other side takes no bytes")
                continue
            except OSError as error:
                raise self._broken(error) from error
            if sent == len(data):
                return
            data = data[sent:]

    def receive(self, view: memoryview, deadline: float) -> int:
        while True:
            self._wait(self._readable, deadline, "the other side sends nothing")
            try:
                count = self._socket.recv_into(view)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._broken(error) from error
            if count == 0:
                raise self._broken(None)
            return count

    def _wait(self, poll: select.poll, deadline: float, problem: str) -> None:
        if self.closed:  # then the number of the descriptor may be that of another
            raise self._broken(None)
        left_s = deadline - time.monotonic()
        if not poll.poll(math.ceil(left_s * 1000) if left_s > 0 else 0):
            raise ChannelTimeout(problem)

    def _broken(self, error: OSError | None) -> ChannelError:
        if self.closed:
            return ChannelError("the channel was closed here")
        return ChannelError(f"{error.strerror or error}" if error else "the other side closed the channel")

    def part(self, wait_s: float = 0.5) -> None:
        """Close so that the other side still gets what was sent. With bytes unread, `close` would take that back."""
        with contextlib.suppress(OSError, ChannelError):
            if not self.closed:
                self._socket.shutdown(socket.SHUT_WR)
                deadline, heard = time.monotonic() + wait_s, memoryview(bytearray(TAKE_BYTES))
                for _ in range(PARTING_READS):
                    self.receive(heard, deadline)
        self.abort()
        self.close()

    def abort(self) -> None:
        self.closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class TlsStream:
    """TLS over a `SocketStream`. `handshake` comes first."""

    def __init__(self, below: SocketStream, context: ssl.SSLContext, server_side: bool) -> None:
        self._below = below
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=server_side)
        self._lock = threading.Lock()  # for the three above
        self._buffer = memoryview(bytearray(TAKE_BYTES))
        self.fileno, self.ends = below.fileno, below.ends
        self.abort, self.close = below.abort, below.close

    @property
    def closed(self) -> bool:
        return self._below.closed

    @property
    def buffered(self) -> bool:
        return bool(self._arrived.pending or self._tls.pending())

    def handshake(self, deadline: float) -> bytes | None:
        """The other side's certificate (DER), None if it shows none. NotPaired if it is not one of the context's."""
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    pass
                self._flush(deadline)
                self._fill(deadline)
            self._flush(deadline)
        except ssl.SSLError as error:
            with contextlib.suppress(ChannelError):
                self._flush(deadline)  # the alert that says so to the other side
            raise _explained(error) from error
        return self._tls.getpeercert(binary_form=True)

    def send(self, data: memoryview, deadline: float) -> None:
        for start in range(0, len(data), SEAL_BYTES):
            try:
                with self._lock:
                    self._tls.write(data[start : start + SEAL_BYTES])
            except ssl.SSLError as error:
                raise _explained(error) from error
            self._flush(deadline)

    def receive(self, view: memoryview, deadline: float) -> int:
        while True:
            if self.buffered:
                try:
                    with self._lock:
                        if count := int(self._tls.read(len(view), view)):  # typeshed says bytes
                            return count
                    raise ChannelError("the other side closed the channel")
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError as error:
                    raise _explained(error) from error
            self._fill(deadline)

    def _fill(self, deadline: float) -> None:
        count = self._below.receive(self._buffer, deadline)
        with self._lock:
            self._arrived.write(self._buffer[:count])

    def _flush(self, deadline: float) -> None:
        with self._lock:
            data = self._leaving.read()
        if data:
            self._below.send(memoryview(data), deadline)


def _address(name: object) -> Address:
    """What the system calls an end, of which a pair of sockets has none."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else ("", 0)


def _explained(error: ssl.SSLError) -> ChannelError | NotPaired:
    """OpenSSL's error in words. The reasons are those of its alerts and of its own checks."""
    reason = error.reason or ""
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return NotPaired("the other node shows a certificate that is not the paired one")
    if "UNKNOWN_CA" in reason or "CERTIFICATE" in reason or "ACCESS_DENIED" in reason:
        return NotPaired("the other node does not know this one, or no longer: pair them again")
    return ChannelError(f"TLS failed: {reason.lower().replace('_', ' ') or 'the connection ended'}")
