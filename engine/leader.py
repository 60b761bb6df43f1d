"""Rank 0 of a group: hands every order to the other ranks, then carries it out itself.

Knows orders as bytes and when one is given up. How they travel, and who the others are, is the group's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from shoal.offload.kv.disk_index import Entry
from shoal.offload.kv.disk_pages import FLUSH_LIMIT_S, KvDisk
from shoal.offload.kv.prefix_cache import Save

from .errors import RankLost
from .executor import Executor, StillWanted
from .order import Order, Reading, Result
from .order_bytes import order_bytes
from .rank import Rank

log = logging.getLogger(__name__)


class Others(Protocol):
    """The other ranks, as their leader reaches them. `begin` raises RankLost."""

    def begin(self, order: bytes) -> None:
        """All of them begin with an order."""

    def end(self) -> None:
        """The order is carried out."""

    def give_up(self) -> None:
        """None of them goes on with the order; nothing happens if none is under way."""


class Leader(Rank):
    """A rank that others follow. Its executor's collective meets them. `slots` says how many pages of KV there is room
    for on the disks of all others now."""

    def __init__(
        self,
        executor: Executor,
        clock: Callable[[], float],
        others: Others,
        disk: KvDisk | None = None,
        slots: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(executor, clock, disk)
        self._others = others
        self._disk = disk
        self._slots = slots
        self._lost = False

    def run(self, order: Order, wanted: StillWanted = lambda share: True) -> Result:
        """Carry out an order together. Raises RankLost besides what a rank alone raises."""
        order = self.placed(order)
        try:
            self._others.begin(order_bytes(self._told(order), tokens=self.executor.vocab is not None))
            try:
                result = super().run(order, wanted)
            except BaseException:
                self._others.give_up()
                raise
        except RankLost:
            self._lost = True
            raise
        self._others.end()
        return result

    def placed(self, order: Order, wait_s: float = 0.0) -> Order:
        if self._disk is not None and order.moves:
            self._disk.bound(self._slots())
        return super().placed(order, wait_s)

    def close(self, known: Sequence[Save], keep_s: float = FLUSH_LIMIT_S) -> None:
        """Keep the pages that are `known` on the disks of all ranks. If one of them is lost, none is kept."""
        if self._disk is None or self._disk.closed:
            return
        try:
            for order in self.keeping([] if self._lost else known, keep_s):
                self.run(order)
        except RankLost as error:
            log.warning("KV that is in memory is not kept on disk: %s", error)
        self._disk.close(known, None)

    def _told(self, order: Order) -> Order:
        """An order as others hear of it: where pages are on disk, not what they are."""
        if self._disk is None or not order.readings:
            return order
        told = self._disk.told
        slots = ([told(it) for it in of.entries if isinstance(it, Entry)] for of in order.readings)
        pages = (of.pages for of in order.readings)
        return replace(order, readings=[Reading(*each) for each in zip(slots, pages, strict=True)])
