"""Where a rank meets the others: the engine's collective over the frames of `comm.group`.

Hidden states are fetched from their home for the wire and placed there again. Errors of the wire become the engine's.
Sums that travel while this rank computes are made in a thread, which lives until the step is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from shoal.comm.group.sums.star import Hub
from shoal.comm.group.sums.star_errors import Departed
from shoal.daemon import cgroup
from shoal.engine.collective import PendingSum
from shoal.engine.errors import RankLost
from shoal.engine.sums_ahead import SumsAhead
from shoal.kernels import ComputeHome
from shoal.kernels.arrays import Bytes, Floats, Hidden

from .pulse import Pulse


class RankExchange(Protocol):
    """What hub and spoke have in common."""

    def watch(self) -> None: ...

    def broadcast(self, rows: Floats | None, shape: tuple[int, int]) -> Floats: ...

    def allreduce(self, partial: Floats) -> Floats: ...

    def gather(self, columns: Floats) -> Floats: ...

    def deal(self, parts: Sequence[Bytes], into: Bytes | None) -> None: ...

    def collect(self, own: Bytes | None, into: Sequence[Bytes]) -> None: ...


class Meeting:
    """A collective for the executor. `pulse` shows when this rank waits for others. Raises RankLost."""

    def __init__(self, exchange: RankExchange, pulse: Pulse) -> None:
        self._exchange = exchange
        self._pulse = pulse
        self._ahead: SumsAhead | None = None
        if cgroup.processors() is None:  # a quota would charge for it, and computing get less
            exchange.watch()

    def broadcast(self, rows: Floats | None, shape: tuple[int, int]) -> Floats:
        with self._waiting():
            return self._exchange.broadcast(rows, shape)

    def allreduce(self, home: ComputeHome, partial: Hidden) -> Hidden:
        if self._ahead is not None:
            return self.start(home, partial)()
        with self._waiting():
            total = self._exchange.allreduce(home.fetch(partial))
        return home.place(total)

    def start(self, home: ComputeHome, partial: Hidden) -> PendingSum:
        if self._ahead is None:
            self._ahead = SumsAhead(self._exchange.allreduce)
        begun = self._ahead.start(home.fetch(partial))

        def arrived() -> Hidden:
            with self._waiting():
                total = begun.result()
            return home.place(total)

        return arrived

    def settle(self) -> None:
        if self._ahead is not None:
            with self._waiting():
                self._ahead.close()
            self._ahead = None

    def gather(self, columns: Floats) -> Floats:
        with self._waiting():
            return self._exchange.gather(columns)

    def deal(self, parts: Sequence[Bytes], into: Bytes | None) -> None:
        with self._waiting():
            self._exchange.deal(parts, into)

    def collect(self, own: Bytes | None, into: Sequence[Bytes]) -> None:
        with self._waiting():
            self._exchange.collect(own, into)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._pulse.at_work = False
        try:
            yield
        except Departed as error:
            raise RankLost(error.rank, error.reason) from error
        finally:
            self._pulse.at_work = True


class Led:
    """The other ranks of a group, for their leader."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def begin(self, order: bytes) -> None:
        """All of them begin with an order. Raises RankLost."""
        try:
            self._hub.begin(order)
        except Departed as error:
            self._hub.give_up()
            raise RankLost(error.rank, error.reason) from error

    def end(self) -> None:
        """The order is carried out."""
        self._hub.end()

    def give_up(self) -> None:
        """None of them goes on with the order."""
        self._hub.give_up()
