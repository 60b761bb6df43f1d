"""A thread that begins copies which take the host time, one after the other, so that who asked for one goes on at once.

What is copied passes through page-locked memory packet by packet, and weights may have to come from a disk first.
Meanwhile the thread that computes has attention to compute. Knows order and errors; not what is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Full, Queue
from typing import Any

from .device import DeviceEvent
from .waiting import Stuck

MOST_WAITING = 1 << 14  # copies that were not begun; whoever asks for one more waits
BEGIN_LIMIT_S = 180.0  # longer than a disk is waited for, whose error says more


class Begun(DeviceEvent):
    """A copy that is begun, or will be. `event` waits for that, and is what `begin` made. Raises what `begin` raised,
    and Stuck if nothing came of it."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin: Callable[[], Any] | None = begin
        self._settled = threading.Event()
        self._event: Any = None
        self._error: BaseException | None = None

    def settle(self) -> None:
        """Begin it."""
        assert self._begin is not None
        try:
            self._event = self._begin()
        except BaseException as error:  # handed on to who waits
            self._error = error
        self._begin = None
        self._settled.set()

    @property
    def event(self) -> Any:
        return self.within(BEGIN_LIMIT_S)

    def within(self, limit_s: float) -> Any:
        """`event`, which is waited for no longer than that."""
        if not self._settled.wait(limit_s):
            raise Stuck(f"CUDA: a copy was not begun in {limit_s:.0f} s")
        if self._error is not None:
            raise self._error
        return self._event


def recorded(event: DeviceEvent) -> Any:
    """The event itself, which may have to be recorded first."""
    return event.event if isinstance(event, Begun) else event


class CopyThread:
    """Begins with the first copy, and ends with the process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: Queue[Begun] = Queue(MOST_WAITING)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, begin: Callable[[], Any]) -> Begun:
        """Have a copy begun after those before it. Raises Stuck if too many are not begun, and stay so."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        return self._enter(Begun(begin), BEGIN_LIMIT_S)

    def drain(self, limit_s: float) -> None:
        """Wait until all of them are begun, or have failed. Raises Stuck if that takes longer. The thread itself,
        where the garbage collector may come by, waits for nothing."""
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._enter(Begun(lambda: None), limit_s).within(limit_s)

    def _enter(self, copy: Begun, limit_s: float) -> Begun:
        try:
            self._waiting.put(copy, timeout=limit_s)
        except Full:
            most = self._waiting.maxsize
            raise Stuck(f"CUDA: of {most} copies that wait none was begun in {limit_s:.0f} s") from None
        return copy

    def _run(self) -> None:
        while True:
            self._waiting.get().settle()
