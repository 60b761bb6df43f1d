"""A rank: what one process of a group holds of a model, and how it carries out an order.

Knows its executor, its pages of KV and those it keeps on disk. Does not know sequences, requests or who gives orders. A
rank alone is a group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shoal.kernels.arrays import Floats
from shoal.models.step import Step
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.prefix_cache import Save

from .executor import Executor, StillWanted
from .order import Order, Reading, Result, Segment


class Rank:
    """Carries out one order at a time. `clock` gives seconds; `disk` keeps KV that leaves memory, if there is one."""

    def __init__(self, executor: Executor, clock: Callable[[], float], disk: KvDisk | None = None) -> None:
        self.executor = executor
        self.disk = disk
        self.kv = executor.kv
        self._clock = clock

    def run(self, order: Order, wanted: StillWanted = lambda share: True) -> Result:
        """Carry out an order. Raises Abandoned soon after `wanted` becomes false, and any error of store or model."""
        store = self.executor.store
        stalled_s = store.stall_s
        self.kv.move(order.moves, self.disk)
        moved_s = self._clock()
        pages_read = [self._read(reading) for reading in order.readings]
        read_s = self._clock() - moved_s
        logits = self._compute(order.segments, wanted)
        return Result(logits, pages_read, read_s, store.stall_s - stalled_s)

    def close(self, known: Sequence[Save], keep_s: float) -> None:
        """Keep the pages that are `known` on disk, if there is one, as far as that goes in so many seconds."""
        if self.disk is not None:
            self.disk.close(known, self.kv.page, keep_s)

    def _read(self, reading: Reading) -> int:
        """How many pages could be read."""
        assert self.disk is not None
        return self.disk.read(reading.entries, [self.kv.page(page) for page in reading.pages])

    def _compute(self, segments: Sequence[Segment], wanted: StillWanted) -> Floats:
        """Logits (R, vocab) of the rows that are wanted. If there are none, a streamed head is not read."""
        if segments:
            step = Step.build(segments, self.executor.plan.part_tokens)
            hidden = self.executor.forward(step, wanted)
            if len(step.rows):
                return self.executor.head(hidden)
        return np.empty((0, self.executor.model.spec.vocab), np.float32)
