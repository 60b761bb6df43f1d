"""The store of a plan that streams: some blocks stay in memory, the others pass through a window, read ahead of need.

Threads read from the pack what the policies (`window`, `expert_cache`) ask for: during compute, sampling and between
steps, from the last block on to the first. Every block is checked against its checksum when it is read for the first
time. A read that fails is raised by `acquire` of that block; the next step tries again. Knows threads, memory and the
file; not in what order blocks should come, nor what is computed with them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels import Matrix, gather_rows, weight_type
from shoal.kernels.memory import Arena
from shoal.models.weights import Weights
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

from .direct import ALIGN_BYTES, DirectFile
from .errors import OffloadError, StoreError
from .expert_cache import ExpertCache
from .pack import Pack
from .store import Resident, Stage
from .window import Chunk, Extent, Line, Passage, Window

READERS = 4
READ_BYTES = 4 << 20  # with four under way, more is not faster (docs/LOG.md)
STAGING_BYTES = 4 << 20  # for rows of the embedding
NEAR_BYTES = 32 << 10  # rows this close to each other are read together
STUCK_S = 120.0  # nothing has come for so long: the disk is taken for dead
IDLE_S = 5.0
LATELY_S = 2.0

Progress = Callable[[int, int], None]


class _Source(Protocol):
    """Who decides what is read next."""

    def next_read(self, most_bytes: int) -> Chunk | None: ...


class WindowStore:
    """A `BlockStore`. One thread acquires, one block of the window at a time; `stage` and `close` are for any thread."""

    def __init__(self, plan: Plan, pack: Pack, file: DirectFile) -> None:
        """Takes its memory; reads nothing yet. Raises StoreError where plan and pack do not fit together."""
        self.stall_s = 0.0
        self._pack = pack
        self._file = file
        self._memory = Arena()
        self._kept: dict[BlockId, Resident] = {}
        self._views: dict[int, tuple[BlockId, Weights]] = {}  # by place in memory
        self._checked: set[BlockId] = set()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # readers wait for something to read
        self._landed = threading.Condition(self._lock)  # acquire waits for bytes
        self._closed = False
        self._broken: BaseException | None = None
        self._latest: deque[tuple[float, int]] = deque()  # when how many bytes came
        self._landed_bytes = 0
        streamed = [item.block for item in plan.blocks if item.tier == "disk"]
        cycle = [self._extent(block) for block in streamed if block.kind not in ("embed", "expert")]
        experts = [self._extent(block) for block in streamed if block.kind == "expert"]
        largest = max((extent.nbytes for extent in cycle), default=0)
        if plan.window_bytes < largest:
            raise StoreError(
                f"a window of {plan.window_bytes} bytes cannot hold the largest block, of {largest} bytes"
            )
        if experts and not plan.expert_slots:
            raise StoreError(f"{len(experts)} experts are on disk, but the plan has no slots for them")
        self._order = {extent.block: i for i, extent in enumerate(cycle)}
        self._stage = 0
        self._urgent = Line()
        self._window = Window(plan.window_bytes, cycle)
        slot_bytes = max((extent.nbytes for extent in experts), default=0)
        self._experts = ExpertCache(plan.expert_slots if experts else 0, slot_bytes, experts)
        self._ring = self._memory.take(_aligned(plan.window_bytes) if cycle else 0)
        self._slots = self._memory.take(plan.expert_slots * slot_bytes)
        self._staging = self._memory.take(STAGING_BYTES)
        self._sources: list[tuple[_Source, Tensor]] = [(self._experts, self._slots)]
        if cycle:
            self._sources.append((self._window, self._ring))
        self._leased: Passage | None = None  # of the window
        self._readers = [
            threading.Thread(target=self._read, name=f"shoal-read-{i}", daemon=True) for i in range(READERS)
        ]

    @classmethod
    def open(
        cls, plan: Plan, pack: Pack, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> WindowStore:
        """Read the blocks that stay; `progress(bytes done, bytes in all)` is called after each. Then the window begins
        to fill. Raises OffloadError."""
        store = cls(plan, pack, DirectFile(pack.path))
        for reader in store._readers:
            reader.start()
        try:
            store._pin([item.block for item in plan.blocks if item.tier == "ram"], progress)
        except BaseException:
            store.close()
            raise
        return store
