"""Waiting until something that was begun on a device has ended, with a limit: torch's own waits and CUDA's have none,
so a device that hangs would hold who waits for ever.

An event is asked again and again. At first without a pause, for as long as the shortest pause would take; no longer,
since who asks keeps Python's lock, so that threads that begin copies would stand still. Then with pauses that grow with
what was waited: half a percent of that too long, on average. What counts is not how long one event takes, behind all
that was begun before it, but whether anything ends.

Knows events and queues; not whose they are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter, sleep
from typing import Any, Protocol

# No single thing takes a card so long. 8192 rows through a feed-forward block of a 70B are 12 s at 1e12 operations a
# second, a gigabyte over one lane of PCIe is 4 s. Compilers and what drivers load take their time in the call itself.
# A daemon that is to stop has 25 s for all.
STILL_LIMIT_S = 20.0
EAGER_S = 50e-6
PAUSE_SHARE = 1 / 128  # of what was waited
MOST_PAUSE_S = 5e-3
LOOK_S = 1.0  # from one look at the whole device to the next
MOST_NOTED = 2048  # events of a queue; a driver has who begins more than about a thousand things wait


class Stuck(RuntimeError):
    """A device, or a thread that works for it, gave no sign of life for so long that it is taken to hang."""


class _Event(Protocol):
    def query(self) -> bool: ...


class SignsOfLife:
    """Of a device: what was begun in each of its queues, and when something of it was last seen to have ended. Any
    thread may call it."""

    def __init__(self) -> None:
        self._begun: dict[Any, deque[_Event]] = {}
        self._moved_s = 0.0
        self._lock = threading.RLock()  # of who takes events out

    def note(self, queue: Any, event: _Event) -> None:
        """Recorded in this queue after all that was noted for it. Takes no lock: the garbage collector may come by, and
        wait for a thread that is here, too."""
        if (begun := self._begun.get(queue)) is None:
            begun = self._begun.setdefault(queue, deque(maxlen=MOST_NOTED))
        begun.append(event)

    def wait(self, ended: Callable[[], bool], look: Callable[[], None]) -> None:
        """Until `ended` says so. `look` is called now and then, and raises what else ends it. Raises Stuck if nothing
        on the device ends for STILL_LIMIT_S."""
        began_s = looked_s = perf_counter()
        while not ended():
            now_s = perf_counter()
            if now_s - looked_s >= LOOK_S:
                look()
                if self._still_s(began_s) >= STILL_LIMIT_S and not ended():
                    raise Stuck(f"CUDA: nothing that was begun has ended for {STILL_LIMIT_S:.0f} s")
                looked_s = now_s
            if now_s - began_s >= EAGER_S:
                sleep(min(MOST_PAUSE_S, PAUSE_SHARE * (now_s - began_s)))

    def _still_s(self, since_s: float) -> float:
        """For how long nothing has ended, at most since then."""
        with self._lock:
            for begun in list(self._begun.values()):
                while begun and begun[0].query():
                    begun.popleft()
                    self._moved_s = perf_counter()
            return perf_counter() - max(since_s, self._moved_s)
