"""A rank: what one process of a group holds of a model, and how it carries out an order.

Knows its executor, its pages of KV and those it keeps on disk. Does not know sequences, requests or who gives orders. A
rank alone is a group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from shoal.kernels.arrays import Floats
from shoal.kernels.errors import HomeLost
from shoal.models.step import Step
from shoal.offload.kv.disk_pages import FLUSH_LIMIT_S
from shoal.offload.kv.pool import KvShelf
from shoal.offload.kv.prefix_cache import Move, Save

from .executor import Executor, StillWanted
from .order import Order, Reading, Result, Segment
from .passed_pages import give_back, receive

DISK_WAIT_S = 1.0  # a page waits so long for room to be copied, if nobody waits for the step
KEPT_TOGETHER = 4  # pages that ranks are told to keep before rank 0 waits for all of them
WAIT_FOR_ALL = Reading((), ())  # every rank says that it has read none


class Rank:
    """Carries out one order at a time. `clock` gives seconds; `disk` keeps KV that leaves memory, if there is one."""

    def __init__(self, executor: Executor, clock: Callable[[], float], disk: KvShelf | None = None) -> None:
        self.executor = executor
        self.disk = disk
        self.kv = executor.kv
        self._clock = clock

    def run(self, order: Order, wanted: StillWanted = lambda share: True) -> Result:
        """Carry out an order. Raises Abandoned soon after `wanted` becomes false, and any error of store or model."""
        store = self.executor.store
        stalled_s = store.stall_s
        order = self.placed(order)
        self.kv.move(order.moves, self.disk, 0.0 if order.segments else DISK_WAIT_S)
        moved_s = self._clock()
        pages_read = self._read_by_all(order.readings)
        read_s = self._clock() - moved_s
        receive(self.executor, order.sent)
        logits = self._compute(order.segments, wanted)
        give_back(self.executor, order.returned)
        return Result(logits, pages_read, read_s, store.stall_s - stalled_s)

    def placed(self, order: Order, wait_s: float = 0.0) -> Order:
        """The same order, in which it is decided where on disk saved pages will lie; those that need not be saved are
        left out. In a group, rank 0 decides, and the others are sent what it has decided. It then has to be run."""
        if not any(isinstance(move, Save) for move in order.moves):
            return order
        assert self.disk is not None
        moves: list[Move] = []
        for move in order.moves:
            if not isinstance(move, Save):
                moves.append(move)
            elif (put := self.disk.place(move, wait_s)) is not None:
                moves.append(put)
        return replace(order, moves=moves)

    def keeping(self, known: Sequence[Save], limit_s: float = FLUSH_LIMIT_S) -> Iterator[Order]:
        """Orders that keep the `known` pages, the most recently used first, on the disks of all ranks before these are
        closed, as far as that goes in `limit_s`. Each has to be run before the next is made. When the last has been
        run, all ranks have carried out all of them."""
        if self.disk is None or self.disk.closed:
            return
        ends_s = self._clock() + limit_s
        behind = 0
        for save in self.disk.worth_keeping(known):
            if (left_s := ends_s - self._clock()) <= 0:
                break
            order = self.placed(Order(moves=[save]), left_s)
            if order.moves:
                behind = (behind + 1) % KEPT_TOGETHER
                yield order if behind else replace(order, readings=[WAIT_FOR_ALL])
        if behind:
            yield Order(readings=[WAIT_FOR_ALL])

    def close(self, known: Sequence[Save], keep_s: float = FLUSH_LIMIT_S) -> None:
        """Keep the pages that are `known` on disk, if there is one, as far as that goes in so many seconds."""
        if self.disk is None:
            return
        with suppress(HomeLost):  # and with it what was to be kept
            self.disk.close(known, self.kv.page, keep_s)

    def _read_by_all(self, readings: Sequence[Reading]) -> list[int]:
        """How many pages of each reading every rank could read, at rank 0; elsewhere, how many this one could."""
        if not readings:
            return []
        mine = [self._read(reading) for reading in readings]
        counts = self.executor.collective.gather(np.array(mine, np.float32)[:, None])  # (readings, ranks)
        if not counts.size:
            return mine
        theirs = np.nan_to_num(counts, nan=0.0).min(1).clip(0, mine)  # whatever others say
        least = [int(count) for count in theirs]
        for reading, own, all_ in zip(readings, mine, least, strict=True):
            if all_ < own and self.disk is not None:  # otherwise it would be looked for again and again
                self.disk.disown(reading.entries[all_])
        return least

    def _read(self, reading: Reading) -> int:
        """How many pages could be read."""
        if self.disk is None:
            return 0
        pages = [self.kv.page(page) for page in reading.pages]
        count = self.disk.read(reading.entries, pages)
        for number, page in zip(reading.pages[:count], pages, strict=False):
            self.kv.put(number, page)
        return count

    def _compute(self, segments: Sequence[Segment], wanted: StillWanted) -> Floats:
        """Logits (R, vocab) of the rows that are wanted."""
        return computed(self.executor, segments, wanted)


def computed(executor: Executor, segments: Sequence[Segment], wanted: StillWanted) -> Floats:
    """Logits (R, vocab) of the rows that are wanted. If there are none, a streamed head is not read."""
    if segments:
        rows = sum(len(segment.tokens) for segment in segments)
        plan = executor.plan
        step = Step.build(segments, plan.rows_together(rows), alike=plan.passes)
        hidden = executor.forward(step, wanted)
        if len(step.rows):
            return executor.head(hidden)
    return np.empty((0, executor.model.spec.vocab), np.float32)
