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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels import WEIGHT_TYPES, Matrix, OperandError, gather_rows
from shoal.kernels.memory import Arena
from shoal.models.weights import Weights
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

from .direct import DirectFile
from .errors import OffloadError, StoreError
from .expert_cache import ExpertCache
from .gather import batches, runs
from .pack import Pack
from .store import Resident, Stage
from .window import Chunk, Extent, Line, Passage, Window

READERS = 4
READ_BYTES = 4 << 20  # four such at a time are as fast as anything (docs/LOG.md)
ROWS_BYTES = 4 << 20  # for rows of the embedding that are being read
NEAR_BYTES = 32 << 10  # rows this close to each other are read together
STUCK_S = 120.0  # nothing has come for so long: the disk is taken for dead
IDLE_S = 5.0
LATELY_S = 2.0

_TYPES = {kind.name: kind for kind in WEIGHT_TYPES}


class _Policy(Protocol):
    """Who decides what is read next, and where to."""

    def next_read(self, most_bytes: int) -> Chunk | None: ...
    def leave(self, passage: Passage) -> None: ...
    def ended(self, passage: Passage) -> None: ...


class _Region:
    """Memory that a policy governs. `whole`: blocks come whole and are checked."""

    def __init__(self, policy: _Policy, memory: Tensor, views: int = 0, whole: bool = True) -> None:
        self.policy = policy
        self.memory = memory
        self.whole = whole
        self._most_views = views
        self._views: dict[BlockId, tuple[int, Weights]] = {}  # and where they look at

    def bytes_of(self, passage: Passage) -> Tensor:
        return self.memory[passage.position : passage.position + passage.nbytes]

    def weights(self, pack: Pack, passage: Passage) -> Weights:
        """Views of a block that is here, made once for each place."""
        position, weights = self._views.get(passage.block, (-1, None))
        if weights is None or position != passage.position:
            if len(self._views) >= self._most_views:
                self._views.clear()
            weights = pack.weights(passage.block, self.bytes_of(passage))
            self._views[passage.block] = passage.position, weights
        return weights


class _Lease:
    """A block of a region, waited for on entering, given back on leaving."""

    __slots__ = ("_block", "_passage", "_region", "_store", "_want")

    def __init__(
        self, store: WindowStore, region: _Region, block: BlockId, want: Callable[[BlockId], Passage | None]
    ) -> None:
        self._store = store
        self._region = region
        self._block = block
        self._want = want

    def __enter__(self) -> Weights:
        self._passage = self._store.wait_for(self._region, lambda: self._want(self._block))
        return self._region.weights(self._store.pack, self._passage)

    def __exit__(self, *_: object) -> None:
        self._store.give_back(self._region, self._passage)


class WindowStore:
    """A `BlockStore`. One thread acquires, of the window one block at a time; `stage` and `close` are for any."""

    def __init__(self, plan: Plan, pack: Pack) -> None:
        """Takes its memory and reads nothing yet. Raises StoreError where plan and pack do not fit together."""
        self.stall_s = 0.0
        self.pack = pack
        streamed = [item.block for item in plan.blocks if item.tier == "disk"]
        cycle = self._extents([block for block in streamed if block.kind not in ("embed", "expert")])
        experts = self._extents([block for block in streamed if block.kind == "expert"])
        pinned = self._extents([item.block for item in plan.blocks if item.tier == "ram"])
        if any(extent.nbytes > plan.window_bytes for extent in cycle):
            raise StoreError(f"a window of {plan.window_bytes} bytes cannot hold the largest block streamed")
        if experts and not plan.expert_slots:
            raise StoreError(f"{len(experts)} experts are on disk, but the plan has no slots for them")
        slot_bytes = max((extent.nbytes for extent in experts), default=0)
        slots = plan.expert_slots if experts else 0
        memory = Arena()
        self._memory = memory
        self._window = Window(plan.window_bytes, cycle)
        self._experts = ExpertCache(slots, slot_bytes, experts)
        self._ring = _Region(self._window, memory.take(plan.window_bytes if cycle else 0), len(cycle))
        self._slots = _Region(self._experts, memory.take(slots * slot_bytes), 2 * slots)
        self._rows_line, self._pins_line = Line(), Line()
        self._rows = _Region(self._rows_line, memory.take(ROWS_BYTES), whole=False)
        total = sum(extent.nbytes for extent in pinned)
        self._pins = _Region(self._pins_line, memory.take(total), len(pinned))
        self._pinned = pinned
        self._regions = [region for region in (self._rows, self._pins, self._slots) if len(region.memory)]
        self._regions += [self._ring] if cycle else []  # last: what is needed at once goes first
        self._kept: dict[BlockId, Resident] = {}
        self._checked: set[BlockId] = set()
        self._order = {block: i + 1 for i, block in enumerate(_without_experts(plan))}
        self._at = 0
        self._streams = bool(cycle or experts)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # readers wait for something to read
        self._landed = threading.Condition(self._lock)  # who acquires waits for bytes
        self._latest: deque[tuple[float, int]] = deque(maxlen=4096)  # when so many bytes came
        self._landings = 0
        self._broken: Exception | None = None
        self._closed = False
        self._file = DirectFile(pack.path)
        self._readers = [
            threading.Thread(target=self._read, name=f"shoal-read-{i}", daemon=True) for i in range(READERS)
        ]
        self._reading = READERS

    @classmethod
    def open(
        cls, plan: Plan, pack: Pack, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> WindowStore:
        """Reads the blocks that stay; `progress(bytes done, bytes in all)` is called after each. The window begins to
        fill behind them. Raises OffloadError."""
        store = cls(plan, pack)
        for reader in store._readers:
            reader.start()
        try:
            store._pin(progress)
        except BaseException:
            store.close()
            raise
        return store

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]:
        self._at = self._order.get(block, self._at)
        if (kept := self._kept.get(block)) is not None:
            return kept
        if block.kind == "expert":
            return _Lease(self, self._slots, block, self._experts.want)
        return _Lease(self, self._ring, block, self._window.want)

    def expect(self, blocks: Sequence[BlockId]) -> None:
        with self._lock:
            self._experts.expect(blocks)
            self._work.notify_all()

    def rows(self, block: BlockId, ids: Tensor) -> Tensor:
        """See `BlockStore`. Only the bands that hold the rows are read."""
        self._at = 0
        if (kept := self._kept.get(block)) is not None:
            return gather_rows(kept.weights.matrix["embed"], ids)
        packed = self.pack.blocks[block]
        tensor = packed.tensors["embed"]
        kind, height = _TYPES[tensor.type], _TYPES[tensor.type].band_rows
        ordered, where = ids.sort()
        if len(ids) and not 0 <= int(ordered[0]) <= int(ordered[-1]) < tensor.rows:
            raise OperandError(f"row ids must be within [0, {tensor.rows})")
        band_bytes = kind.matrix_bytes(height, tensor.cols)
        bands = torch.unique_consecutive(ordered // height).tolist()
        reads = runs(
            bands,
            band_bytes,
            packed.offset + tensor.offset,
            near_bytes=NEAR_BYTES,
            most_bytes=ROWS_BYTES // READERS,
        )
        ends = torch.tensor([(run.last + 1) * height for run in reads])
        counts = torch.searchsorted(ordered, ends).tolist()  # ids up to the end of each run
        out = torch.empty(len(ids), tensor.cols)
        done = 0
        for batch in batches(reads, ROWS_BYTES):
            memory = self._rows.memory
            passages = []
            position = 0
            for run in batch:
                passages.append(Passage(block, run.offset, position, run.nbytes))
                position += run.nbytes
            self._fetch(self._rows, self._rows_line, passages)
            for run, passage in zip(batch, passages, strict=True):
                start = passage.position + run.skip
                rows = (run.last + 1 - run.first) * height
                matrix = Matrix(
                    kind, memory[start : start + kind.matrix_bytes(rows, tensor.cols)], rows, tensor.cols
                )
                upto = counts.pop(0)
                out[where[done:upto]] = gather_rows(matrix, ordered[done:upto] - run.first * height)
                done = upto
        return out

    def stage(self) -> Stage | None:
        if not self._streams:
            return None
        with self._lock:
            now = time.monotonic()
            recent = [(at, nbytes) for at, nbytes in self._latest if now - at < LATELY_S]
        span = max(now - recent[0][0], 0.1) if recent else 1.0
        return Stage(self._at, len(self._order), sum(nbytes for _, nbytes in recent) / span)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._landed.notify_all()
        until = time.monotonic() + 2.0
        for reader in self._readers:
            reader.join(max(0.0, until - time.monotonic()))

    def wait_for(self, region: _Region, want: Callable[[], Passage | None]) -> Passage:
        """Leases a passage once it is here. Raises OffloadError when it cannot be read."""
        with self._lock:
            passage = want()
            if passage is None or not passage.here:
                began_s = time.perf_counter()
                try:
                    passage = self._await(region, want)
                finally:
                    self.stall_s += time.perf_counter() - began_s
            passage.leases += 1
            return passage

    def give_back(self, region: _Region, passage: Passage) -> None:
        """Ends a lease: the place may be used again."""
        with self._lock:
            passage.leases -= 1
            region.policy.leave(passage)
            self._work.notify_all()

    def _await(self, region: _Region, want: Callable[[], Passage | None]) -> Passage:
        """The lock is held, and let go while waiting."""
        self._work.notify_all()
        seen, since_s = self._landings, time.monotonic()
        while True:
            if self._closed or self._broken is not None:
                raise StoreError(f"{self.pack.path}: is not read any more") from self._broken
            passage = want()
            if passage is not None and passage.error is not None:
                region.policy.leave(passage)
                self._work.notify_all()
                raise passage.error
            if passage is not None and passage.here:
                return passage
            self._landed.wait(1.0)
            if self._landings != seen:
                seen, since_s = self._landings, time.monotonic()
            elif time.monotonic() - since_s > STUCK_S:
                raise StoreError(f"{self.pack.path}: nothing could be read for {STUCK_S:.0f} s")

    def _fetch(
        self,
        region: _Region,
        line: Line,
        passages: Sequence[Passage],
        each: Callable[[Passage], None] = lambda passage: None,
    ) -> None:
        """Reads passages at once; `each` is called as they are here, in their order."""
        with self._lock:
            for passage in passages:
                line.add(passage)
        try:
            for passage in passages:
                self.wait_for(region, partial(_same, passage))
                each(passage)
        except BaseException:
            with self._lock:  # reads that are under way still write to this memory
                for passage in passages:
                    line.leave(passage)
                region.memory = self._memory.take(len(region.memory))
            raise

    def _pin(self, progress: Callable[[int, int], None]) -> None:
        passages = []
        position = 0
        for block, offset, nbytes in self._pinned:
            passages.append(Passage(block, offset, position, nbytes))
            position += nbytes

        def keep(passage: Passage) -> None:
            self._kept[passage.block] = Resident(self._pins.weights(self.pack, passage))
            progress(passage.position + passage.nbytes, position)

        self._fetch(self._pins, self._pins_line, passages, keep)
        self.stall_s = 0.0

    def _read(self) -> None:
        """What a reader does until the store is closed."""
        try:
            while (job := self._next()) is not None:
                self._carry(*job)
        except Exception as error:  # whatever it was, it is raised where weights are waited for
            with self._lock:
                self._broken = error
                self._landed.notify_all()
        finally:
            with self._lock:
                self._reading -= 1
                if not self._reading:
                    self._file.close()

    def _next(self) -> tuple[_Region, Tensor, Chunk] | None:
        """What to read now, waiting until there is something; None when the store is closed."""
        with self._lock:
            while not self._closed:
                for region in self._regions:
                    if (chunk := region.policy.next_read(READ_BYTES)) is not None:
                        return region, region.bytes_of(chunk.passage), chunk
                self._work.wait(IDLE_S)
        return None

    def _carry(self, region: _Region, memory: Tensor, chunk: Chunk) -> None:
        """Reads a chunk into the place of its passage; the one that completes a block checks it."""
        passage, start, nbytes = chunk
        error: Exception | None = None
        try:
            self._file.read(passage.offset + start, memory[start : start + nbytes])
        except (OSError, EOFError) as caught:
            reason = caught.strerror if isinstance(caught, OSError) else str(caught)
            error = StoreError(
                f"block {passage.block}: {nbytes} bytes from byte {passage.offset + start} of {self.pack.path} "
                f"cannot be read: {reason}"
            )
        with self._lock:
            passage.error = passage.error or error
            whole = passage.landed + nbytes == passage.nbytes and passage.error is None
            check = whole and region.whole and passage.block not in self._checked and not passage.left
            if not check:
                self._note(region, chunk)
        if check:
            try:
                self.pack.check(passage.block, memory)
            except OffloadError as caught:
                error = caught
            with self._lock:
                passage.error = error
                if error is None:
                    self._checked.add(passage.block)
                self._note(region, chunk)

    def _note(self, region: _Region, chunk: Chunk) -> None:
        """The read of a chunk has ended. The lock is held."""
        passage = chunk.passage
        passage.landed += chunk.nbytes
        self._landings += 1
        self._latest.append((time.monotonic(), chunk.nbytes))
        region.policy.ended(passage)
        if passage.left:
            self._work.notify_all()
        if passage.error is not None or passage.landed == passage.nbytes:
            self._landed.notify_all()

    def _extents(self, blocks: Sequence[BlockId]) -> list[Extent]:
        found = []
        for block in blocks:
            packed = self.pack.blocks.get(block)
            if packed is None:
                raise StoreError(f"{self.pack.path}: the pack has no block {block}")
            found.append(Extent(block, packed.offset, packed.nbytes))
        return found


def _same(passage: Passage) -> Passage:
    return passage


def _without_experts(plan: Plan) -> list[BlockId]:
    return [item.block for item in plan.blocks if item.block.kind not in ("embed", "expert")]
