"""Whose turn it is, where clients wait for something of which there is not enough for all at once.

Clients take turns, so that one that asks for much or for costly things holds up no other by more than one of them. Each
client's own wishes are met in their order. Knows clients as names. Does not know what they wait for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")
_LOOK_S = 0.1

CLIENT: ContextVar[str] = ContextVar("client", default="")
"""On whose behalf this thread works; "" is the process itself."""


@contextmanager
def on_behalf_of(client: str) -> Iterator[None]:
    before = CLIENT.set(client)
    try:
        yield
    finally:
        CLIENT.reset(before)


def free_for(client: str, holders: Collection[str], slots: int) -> bool:
    """Whether a client may have one of `slots`, of which `holders` have one each. The last that is free is kept for who
    has none, so that a newcomer need not wait until somebody has finished."""
    free = slots - len(holders)
    return free > 1 or (free == 1 and client not in holders)


class RoundRobin(Generic[T]):
    """What clients wait for. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}  # those whose turn comes first are first

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, client: str, thing: T) -> None:
        self._waiting.setdefault(client, deque()).append(thing)

    def next(self, may: Callable[[str, T], bool]) -> tuple[str, T] | None:
        """Whose turn it is among those that `may`."""
        return next(
            ((client, thing) for client, own in self._waiting.items() for thing in own if may(client, thing)),
            None,
        )

    def take(self, client: str, thing: T) -> None:
        """It is not waited for any more, and the client's others come after those of all others."""
        self._waiting[client].remove(thing)
        self.put_last(client)

    def put_last(self, client: str) -> None:
        """The client's turn comes after all others', also those that have come while it was served."""
        if own := self._waiting.pop(client, None):
            self._waiting[client] = own

    def before(self, client: str, thing: T) -> int:
        """How many others the client itself has waited for longer."""
        return self._waiting[client].index(thing)

    def clear(self) -> None:
        self._waiting.clear()


class Turns:
    """Threads that wait until they may go on. What they look at is changed under `changed`, and told by it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._waiting = RoundRobin[Callable[[], bool]]()

    def wait(
        self,
        may: Callable[[], bool],
        look: Callable[[int], None] = lambda before: None,
        look_s: float = _LOOK_S,
    ) -> None:
        """Return when `may` is true and it is this thread's turn. Call it under `changed`, with a function of its own.

        look: called every `look_s` while it waits, with how many of the same client wait for longer; what it raises
        ends the waiting.
        """
        client = CLIENT.get()
        self._waiting.put(client, may)
        try:
            look_at_s = time.monotonic() + look_s
            while (turn := self._waiting.next(lambda _, one: one())) is None or turn[1] is not may:
                if time.monotonic() >= look_at_s:
                    look(self._waiting.before(client, may))
                    look_at_s += look_s
                self.changed.wait(look_s)
        finally:
            self._waiting.take(client, may)
            self.changed.notify_all()  # it may be another's turn now

    def served(self, client: str) -> None:
        """A thread has what it waited for no longer. Call it under `changed`."""
        self._waiting.put_last(client)
        self.changed.notify_all()


class FairLock:
    """A lock that clients have in turn."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._held = False

    @contextmanager
    def held(self, look: Callable[[], None] = lambda: None, look_s: float = _LOOK_S) -> Iterator[None]:
        """Within it no other thread is. While it waits, `look` is called now and then; what it raises ends the
        waiting."""
        with self._turns.changed:
            self._turns.wait(lambda: not self._held, lambda before: look(), look_s)
            self._held = True
        try:
            yield
        finally:
            with self._turns.changed:
                self._held = False
                self._turns.served(CLIENT.get())


class TurnPool:
    """Threads for what clients want done, begun when they are needed."""

    def __init__(self, threads: int, name: str) -> None:
        self._slots, self._name = threads, name
        self._changed = threading.Condition()
        self._waiting = RoundRobin[Callable[[], None]]()
        self._holders: list[str] = []  # the clients whose acts are being done
        self._threads = self._idle = 0
        self._closed = False

    def submit(self, client: str, act: Callable[[], None]) -> None:
        """Have `act` called, which raises nothing; not any more after `close`."""
        with self._changed:
            if self._closed:
                return
            self._waiting.put(client, act)
            if self._idle < len(self._waiting) and self._threads < self._slots:
                self._threads += 1
                threading.Thread(target=self._work, name=f"{self._name}_{self._threads}").start()
            self._changed.notify()

    def close(self) -> None:
        """Begin nothing more. What has begun goes on."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        # In a function of its own, as a variable of this one would keep a model in memory.
        while self._acted():
            pass

    def _acted(self) -> bool:
        """Do what is next. False when the pool is closed."""
        if (turn := self._turn()) is None:
            return False
        client, act = turn
        try:
            with on_behalf_of(client):
                act()
        finally:
            with self._changed:
                self._holders.remove(client)
                self._waiting.put_last(client)
                self._changed.notify()
        return True

    def _turn(self) -> tuple[str, Callable[[], None]] | None:
        """The next act and its client; None when the pool is closed."""
        with self._changed:
            self._idle += 1
            while True:
                turn = self._waiting.next(lambda client, _: free_for(client, self._holders, self._slots))
                if turn is not None or self._closed:
                    break
                self._changed.wait()
            self._idle -= 1
            if turn is not None:
                self._waiting.take(*turn)
                self._holders.append(turn[0])
            return turn
