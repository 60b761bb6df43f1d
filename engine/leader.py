"""Rank 0 of a group: hands every order to the other ranks, then carries it out itself.

Knows orders as bytes and when one is given up. How they travel, and who the others are, is the group's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .executor import Executor, StillWanted
from .order import Order, Result
from .order_bytes import order_bytes
from .rank import Rank


class Others(Protocol):
    """The other ranks, as their leader reaches them. `begin` raises RankLost."""

    def begin(self, order: bytes) -> None:
        """All of them begin with an order."""

    def end(self) -> None:
        """The order is carried out."""

    def give_up(self) -> None:
        """None of them goes on with the order; nothing happens if none is under way."""


class Leader(Rank):
    """A rank that others follow. Its executor's collective meets them."""

    def __init__(self, executor: Executor, clock: Callable[[], float], others: Others) -> None:
        super().__init__(executor, clock)
        self._others = others

    def run(self, order: Order, wanted: StillWanted = lambda share: True) -> Result:
        """Carry out an order together. Raises RankLost besides what a rank alone raises."""
        self._others.begin(order_bytes(order))
        try:
            result = super().run(order, wanted)
        except BaseException:
            self._others.give_up()
            raise
        self._others.end()
        return result
