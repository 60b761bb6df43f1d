"""A wake-up line from any thread, or a signal handler, to one polling thread.

Knows one bit: something happened. Does not carry what happened; a queue beside it does.
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
        """A descriptor that wakes by whatever is written to it, for `signal.set_wakeup_fd`."""
        return self._sender.fileno()

    def wake(self) -> None:
        """Never blocks; many calls before one `clear` cost one byte."""
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # full (then it is awake anyway) or closed
                self._sender.send(b"\0")

    def clear(self) -> None:
        # The flag falls after the read: a wake in between finds its queue item looked at next.
        with contextlib.suppress(BlockingIOError):
            self._receiver.recv(4096)
        self._awake = False

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()
