"""A stream between two processes of one machine: a ring of bytes each way in memory that they share, and a bell.

The bell is a pair of sockets. A byte in it says that there is something to look for again; it is sent only to who
sleeps. It also ends when the other process does, however that ends. The memory cannot be made smaller by anybody, and
nothing in it is believed (native/bytes.cpp).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import select
import socket
import time
from ctypes import addressof, byref
from typing import Any

from .errors import ChannelError, ChannelTimeout
from .native_bytes import NativeBytes, RingSide, address_of, native_bytes
from .streams import Address, SocketStream
from .watching import Watching, watching

RING_BYTES = 1 << 20  # each way
# Who sleeps looks so often by himself, as another thread may have taken what the bell said.
BELL_LOOK_S = 0.25
SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")


def can_share() -> bool:
    """Whether this system has such memory, and the native part is there."""
    return hasattr(os, "memfd_create") and native_bytes() is not None


def shared_memory() -> int:
    """Memory for one stream: a descriptor, which the caller closes. OSError."""
    descriptor = os.memfd_create("shoal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, _memory_bytes())
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _seals())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_memory(descriptor: int) -> None:
    """Whether it is what `shared_memory` makes, whoever sent it. ChannelError, OSError."""
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _seals() != _seals():
        raise ChannelError("memory that could be made smaller")
    if (size := os.fstat(descriptor).st_size) != _memory_bytes():
        raise ChannelError(f"memory of {size} bytes: must be {_memory_bytes()}")


def _seals() -> int:
    return sum(getattr(fcntl, name) for name in SEALS)


def _native() -> NativeBytes:
    native = native_bytes()
    assert native is not None
    return native


def _memory_bytes() -> int:
    return 2 * (_native().ring_head + RING_BYTES)


class SharedStream:
    """One end. `first`: whether it is the end of whoever made the memory; the descriptor may be closed afterwards."""

    room_event = select.POLLIN
    unsent = False

    def __init__(
        self,
        memory: int,
        bell: socket.socket,
        first: bool,
        ends: tuple[Address, Address] = (("", 0), ("", 0)),
    ) -> None:
        native = _native()
        self._ring_write, self._ring_read = native.ring_write, native.ring_read
        self._ring_listen = native.ring_listen
        self._memory = mmap.mmap(memory, _memory_bytes())
        self._base: Any = address_of(memoryview(self._memory))  # keeps the memory there as long as it is used
        self._bell = SocketStream(bell)
        rings = [addressof(self._base) + half * (native.ring_head + RING_BYTES) for half in (0, 1)]
        out, into = rings if first else reversed(rings)
        self._out = RingSide(out, RING_BYTES, 0, bell.fileno(), 0)
        self._into = RingSide(into, RING_BYTES, 0, bell.fileno(), 0)
        self._at = byref(self._out), byref(self._into)
        self._ends = ends
        self._rung = memoryview(bytearray(1))
        self._watching: Watching | None = None
        self.ready(True, False)  # so the bell rings from the first byte on

    @property
    def closed(self) -> bool:
        return self._bell.closed

    @property
    def moved(self) -> int:
        return int(self._out.count + self._into.count)

    def fileno(self) -> int:
        return self._bell.fileno()

    def ready(self, data: bool, room: bool) -> bool:
        return self.closed or bool(self._ring_listen(*self._at, data, room))

    def ends(self) -> tuple[Address, Address]:
        return self._ends

    def send(self, data: memoryview, deadline: float) -> None:
        while len(data := data[self.send_some(data) :]):
            self._sleep(deadline, "the other side takes no bytes")

    def send_some(self, data: memoryview) -> int:
        if not len(data) or self.closed:
            return self._moved(0)
        if data.readonly:
            data = memoryview(bytearray(data[:RING_BYTES]))
        return self._moved(self._ring_write(self._at[0], address_of(data), len(data)))

    def watch(self) -> None:
        self._watching = watching()

    def receive(self, view: memoryview, deadline: float) -> int:
        waits = deadline > time.monotonic()
        look = self._watching if waits else None
        while True:
            limit_ns = look.limit_ns() if look else 0
            count = self._read(view, limit_ns)
            if look and limit_ns:
                look.note(count > 0, self._into.effort)
            if self._moved(count):
                return count
            look = None  # who sleeps for long does not look again and again in between
            try:
                self._sleep(deadline, "the other side sends nothing")
            except ChannelError:
                # It may have ended after its last bytes, for which another thread has heard the bell.
                if count := self._read(view, 0):
                    return self._moved(count)
                raise

    def _read(self, view: memoryview, limit_ns: int) -> int:
        return 0 if self.closed else int(self._ring_read(self._at[1], address_of(view), len(view), limit_ns))

    def abort(self) -> None:
        self._bell.abort()

    def close(self) -> None:
        self._bell.close()
        self._base = None
        self._memory.close()

    def _moved(self, count: int) -> int:
        """The same. ChannelError if it is none."""
        if self.closed:
            raise ChannelError("the channel was closed here")
        if count < 0:
            broken = (
                "what is in the memory cannot be"
                if count == -errno.EPROTO
                else "the other side closed the channel"
            )
            raise ChannelError(broken)
        return int(count)

    def _sleep(self, deadline: float, problem: str) -> None:
        """Until the bell rings, or for a while. ChannelTimeout at the deadline."""
        now_s = time.monotonic()
        if now_s >= deadline:
            raise ChannelTimeout(problem)
        with contextlib.suppress(ChannelTimeout):
            self._bell.receive(self._rung, min(deadline, now_s + BELL_LOOK_S))


def shared_pair() -> tuple[SharedStream, SharedStream]:
    """Both ends within one process."""
    memory = shared_memory()
    try:
        near, far = socket.socketpair()
        return SharedStream(memory, near, True), SharedStream(memory, far, False)
    finally:
        os.close(memory)
