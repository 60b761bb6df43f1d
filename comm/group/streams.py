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
import struct
import threading
import time
from collections.abc import Callable
from typing import Protocol

from .errors import DOES_NOT_KNOW, NOT_PROVED, ChannelError, ChannelTimeout, Forgotten, NotPaired
from .watching import Watching, watching

Address = tuple[str, int]  # host and port

TAKE_BYTES = 128 << 10  # taken from the socket at a time
PARTING_READS = 8
SEAL_BYTES = 256 << 10  # given to TLS, and then to the socket, at a time

# Linux; elsewhere the default of the system holds. The group notices earlier that a machine is gone, and closes. There
# is no TCP_USER_TIMEOUT: it would also end the connection to one that computes for long and reads nothing meanwhile.
_OPTIONS = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}


class Stream(Protocol):
    """What a channel needs."""

    @property
    def closed(self) -> bool: ...

    @property
    def moved(self) -> int:
        """How many bytes the system has taken and given so far."""

    def fileno(self) -> int: ...

    @property
    def room_event(self) -> int:
        """What `poll` says of `fileno` when `send_some` may take more again."""

    def ready(self, data: bool, room: bool) -> bool:
        """Whether what one wants is there, something to read or room for `send_some`, though `poll` may not say so.
        Otherwise it will."""

    def ends(self) -> tuple[Address, Address]:
        """Host and port of the other side, and of this one."""

    def send(self, data: memoryview, deadline: float) -> None:
        """All of `data`. ChannelTimeout, ChannelError."""

    @property
    def unsent(self) -> bool:
        """Whether `send_some` has taken bytes that the socket has not."""

    def send_some(self, data: memoryview) -> int:
        """What goes without waiting, after what was taken before: how many bytes of `data` were taken. ChannelError."""

    def watch(self) -> None:
        """From now on, look for bytes for a while before a thread sleeps until they come: to wake it takes longer than
        most of them do. For those who have a processor to spare."""

    def receive(self, view: memoryview, deadline: float) -> int:
        """Into `view`, at least one byte; how many. ChannelTimeout when there was none, ChannelError at the end."""

    def abort(self) -> None:
        """Wake whoever waits. Nothing can be sent or received any more, but the descriptor is still there."""

    def close(self) -> None:
        """Free the descriptor, after `abort` and when nobody else uses the stream."""


class SocketStream:
    """A connected stream socket, TCP or of a pair."""

    unsent = False
    room_event = select.POLLOUT

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(True)
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _OPTIONS.items():
                if option := getattr(socket, name, None):
                    connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket = connected
        self._writable = select.poll()
        self._writable.register(connected, select.POLLOUT)
        self._limit_s = 0.0  # that of `recv` as it is set; 0 is none
        self._watching: Watching | None = None
        self._sent = self._received = 0  # bytes; each is one thread's
        self._ending = threading.Lock()  # so that none ends a descriptor that is another's by now
        self.closed = False

    def connect(self, target: tuple[str | int, ...], deadline: float) -> None:
        """To a socket address; for a stream whose socket is not connected. ChannelTimeout, ChannelError."""
        self._socket.setblocking(False)
        problem = self._socket.connect_ex(target)
        if problem == errno.EINPROGRESS:
            self._wait(self._writable, deadline, "no answer")
            problem = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            raise self._broken(OSError(problem, os.strerror(problem)))
        self._socket.setblocking(True)

    def fileno(self) -> int:
        return self._socket.fileno()

    def ready(self, data: bool, room: bool) -> bool:
        return False

    def ends(self) -> tuple[Address, Address]:
        return _address(self._socket.getpeername), _address(self._socket.getsockname)

    def send(self, data: memoryview, deadline: float) -> None:
        while True:
            try:
                sent = self._socket.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait(self._writable, deadline, "the other side takes no bytes")
                continue
            except OSError as error:
                raise self._broken(error) from error
            self._sent += sent
            if sent == len(data):
                return
            data = data[sent:]

    def send_some(self, data: memoryview) -> int:
        try:
            sent = self._socket.send(data, socket.MSG_DONTWAIT) if data else 0
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._broken(error) from error
        self._sent += sent
        return sent

    def receive(self, view: memoryview, deadline: float) -> int:
        flags = self._limit(deadline)
        try:
            look = None if flags else self._watching
            count = look.looked_for(self._socket.fileno(), view) if look else 0
            count = count or self._socket.recv_into(view, 0, flags)
        except BlockingIOError as error:
            raise ChannelTimeout("the other side sends nothing") from error
        except OSError as error:
            raise self._broken(error) from error
        if count == 0:
            raise self._broken(None)
        self._received += count
        return count

    def watch(self) -> None:
        self._watching = watching()

    @property
    def moved(self) -> int:
        return self._sent + self._received

    def _limit(self, deadline: float) -> int:
        """Have the system end a `recv` at the deadline, or up to an eighth later; the flags to call it with.

        So most calls need no `poll` before them, which would be 2 µs of each round.
        """
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return socket.MSG_DONTWAIT
        if not left_s <= self._limit_s <= left_s * 1.125:
            self._limit_s = left_s * 1.0625
            seconds, rest_s = divmod(self._limit_s, 1)
            limit = struct.pack("@ll", int(seconds), int(rest_s * 1e6) + 1)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            except OSError as error:  # never go on: the `recv` would have no end
                raise self._broken(error) from error
        return 0

    def _wait(self, poll: select.poll, deadline: float, problem: str) -> None:
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
        with self._ending, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._ending:
            self._socket.close()


class TlsStream:
    """TLS over a `SocketStream`. `handshake` comes first."""

    room_event = select.POLLOUT

    def __init__(self, below: SocketStream, context: ssl.SSLContext, server_side: bool) -> None:
        self._below = below
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=server_side)
        self._lock = threading.Lock()  # for the three above
        self._buffer = memoryview(bytearray(TAKE_BYTES))
        self._sealed = memoryview(b"")  # what the socket has not taken yet
        self.fileno, self.ends, self.watch = below.fileno, below.ends, below.watch
        self.abort, self.close = below.abort, below.close

    @property
    def closed(self) -> bool:
        return self._below.closed

    @property
    def moved(self) -> int:
        return self._below.moved

    def ready(self, data: bool, room: bool) -> bool:
        return data and bool(self._arrived.pending or self._tls.pending())

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
            raise _explained(error, proved=False) from error
        return self._tls.getpeercert(binary_form=True)

    @property
    def unsent(self) -> bool:
        return bool(self._sealed)

    def send(self, data: memoryview, deadline: float) -> None:
        if self._sealed:
            self._below.send(self._sealed, deadline)
            self._sealed = memoryview(b"")
        for start in range(0, len(data), SEAL_BYTES):
            self._below.send(self._seal(data[start : start + SEAL_BYTES]), deadline)

    def send_some(self, data: memoryview) -> int:
        taken = 0
        while self._push() and taken < len(data):
            self._sealed = self._seal(data[taken : taken + SEAL_BYTES])
            taken = min(len(data), taken + SEAL_BYTES)
        return taken

    def _push(self) -> bool:
        """Whether the socket has taken all that is sealed."""
        while self._sealed:
            if not (sent := self._below.send_some(self._sealed)):
                return False
            self._sealed = self._sealed[sent:]
        return True

    def _seal(self, data: memoryview) -> memoryview:
        try:
            with self._lock:
                self._tls.write(data)
                return memoryview(self._leaving.read())
        except ssl.SSLError as error:
            raise _explained(error) from error

    def receive(self, view: memoryview, deadline: float) -> int:
        while not (count := self._read(view)):
            self._fill(deadline)
        return count

    def _read(self, view: memoryview) -> int:
        """Into `view` what has come, record by record, until it is full."""
        filled = 0
        try:
            with self._lock:
                while filled < len(view) and (self._arrived.pending or self._tls.pending()):
                    count = int(self._tls.read(len(view) - filled, view[filled:]))  # typeshed says bytes
                    if not count:
                        if not filled:
                            raise ChannelError("the other side closed the channel")
                        break
                    filled += count
        except ssl.SSLWantReadError:  # a part of a record
            pass
        except ssl.SSLError as error:
            raise _explained(error) from error
        return filled

    def _fill(self, deadline: float) -> None:
        count = self._below.receive(self._buffer, deadline)
        with self._lock:
            self._arrived.write(self._buffer[:count])

    def _flush(self, deadline: float) -> None:
        with self._lock:
            data = self._leaving.read()
        if data:
            self._below.send(memoryview(data), deadline)


def _address(ask: Callable[[], object]) -> Address:
    """What the system calls an end. A pair of sockets has no names, nor has an end that is gone."""
    with contextlib.suppress(OSError):
        match ask():
            case (str(host), int(port), _, int(scope)) if scope:
                # Link-local: of no use without the interface.
                return f"{host}%{socket.if_indextoname(scope)}", port
            case (str(host), int(port), *_):
                return host, port
    return "", 0


def _explained(error: ssl.SSLError, *, proved: bool = True) -> ChannelError | NotPaired:
    """OpenSSL's error in words. The reasons are those of its alerts and of its own checks. `proved`: the handshake is
    over on this side, so what came is the other node's; before that, anybody may have sent it."""
    reason = error.reason or ""
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return NotPaired("the other node shows a certificate that is not the paired one")
    if "UNKNOWN_CA" in reason or "CERTIFICATE" in reason or "ACCESS_DENIED" in reason:
        return Forgotten(DOES_NOT_KNOW) if proved else NotPaired(NOT_PROVED)
    return ChannelError(f"TLS failed: {reason.lower().replace('_', ' ') or 'the connection ended'}")
