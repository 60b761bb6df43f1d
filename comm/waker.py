"""How any thread, or a signal handler, wakes the one thread that polls.

Carries one bit: something happened. What happened is in a queue beside it.
"""

from __future__ import annotations

import contextlib
import socket


class Waker:
    """Poll `fileno()` for reading; call `clear()` before looking at the queue."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._awake = False

    def fileno(self) -> int:
        return self._receiver.fileno()

    def sender_fileno(self) -> int:
        """A descriptor for `signal.set_wakeup_fd`: any byte written to it wakes the polling thread."""
        return self._sender.fileno()

    def wake(self) -> None:
        """Wake the polling thread. Never blocks; many calls before one `clear` send one byte."""
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # full, so that the thread is awake anyway, or closed
                self._sender.send(b"\0")

    def clear(self) -> None:
        # A `wake` between the read and the reset sends no byte, but its item in the queue is looked at next.
        with contextlib.suppress(BlockingIOError):
            self._receiver.recv(4096)
        self._awake = False

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()
