"""The store of a plan that streams: some blocks stay in memory, the others pass through a window, read ahead of need.

Reading goes on during compute, sampling and between steps, from the last block on to the first. Knows which memory a
plan's blocks use; what is read when is the policies' business (`window`, `expert_cache`), how it is read `readers`'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from shoal.kernels import gather_rows
from shoal.kernels.arrays import Floats, Ids
from shoal.kernels.huge_pages import Arena
from shoal.models.weights import Weights
from shoal.offload.block_store import Resident, Stage
from shoal.offload.errors import StoreError
from shoal.offload.pack.pack import Pack
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

from .embedding import Embedding, Fetcher
from .expert_cache import ExpertCache
from .readers import Readers, Region
from .window import Extent, Passage, Window


class _Lease:
    """A block of a region, waited for on entering, given back on leaving."""

    __slots__ = ("_passage", "_readers", "_region", "_want")

    def __init__(self, readers: Readers, region: Region, want: Callable[[], Passage | None]) -> None:
        self._readers = readers
        self._region = region
        self._want = want

    def __enter__(self) -> Weights:
        self._passage = self._readers.lease(self._region, self._want)
        return self._region.weights(self._readers.pack, self._passage)

    def __exit__(self, *_: object) -> None:
        self._readers.give_back(self._region, self._passage)


class WindowStore:
    """A `BlockStore`. One thread acquires, of the window one block at a time; `stage` and `close` are for any."""

    def __init__(self, plan: Plan, pack: Pack) -> None:
        """Takes its memory and begins to read what passes through the window. Raises StoreError."""
        streamed = [item.block for item in plan.blocks if item.tier == "disk"]
        cycle = _extents(pack, [block for block in streamed if block.kind not in ("embed", "expert")])
        experts = _extents(pack, [block for block in streamed if block.kind == "expert"])
        pinned = [item.block for item in plan.blocks if item.tier == "ram"]
        tables = {block for block in pack.blocks if block.kind in ("embed", "head")}
        self._embed_is_head = pack.tied and tables <= set(pinned)
        self._pinned = _extents(
            pack, [block for block in pinned if block.kind != "embed" or not self._embed_is_head]
        )
        if any(extent.nbytes > plan.window_bytes for extent in cycle):
            raise StoreError(f"a window of {plan.window_bytes} bytes cannot hold the largest block streamed")
        if experts and not plan.expert_slots:
            raise StoreError(f"{len(experts)} experts are on disk, but the plan has no slots for them")
        arena = Arena()
        self._pins = Fetcher(sum(extent.nbytes for extent in self._pinned), whole=True)
        regions = [self._pins.region]
        self._embedding = Embedding(pack) if BlockId("embed") in streamed else None
        if self._embedding is not None:
            regions.insert(0, self._embedding.region)  # what is needed at once goes first
        if experts:
            slot_bytes = max(extent.nbytes for extent in experts)
            self._experts = ExpertCache(plan.expert_slots, slot_bytes, experts)
            memory = arena.take(plan.expert_slots * slot_bytes)
            self._slots = Region(self._experts, memory, slots=True)
            regions.append(self._slots)
        if cycle:
            self._window = Window(plan.window_bytes, cycle)
            self._ring = Region(self._window, arena.take(plan.window_bytes))
            regions.append(self._ring)
        self._streams = bool(cycle or experts)
        self._kept: dict[BlockId, Resident] = {}
        blocks = [item.block for item in plan.blocks if item.block.kind not in ("embed", "expert")]
        self._place = {block: i + 1 for i, block in enumerate(blocks)}
        self._done = 0  # of these, in this step
        self._readers = Readers(pack, regions)

    @classmethod
    def open(
        cls, plan: Plan, pack: Pack, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> WindowStore:
        """With the blocks that stay in memory; `progress(bytes done, bytes in all)` is called after each. Raises
        OffloadError."""
        store = cls(plan, pack)
        try:
            store._pin(pack, progress)
            if store._embedding is not None:
                store._embedding.check(store._readers)
        except BaseException:
            store.close()
            raise
        store._readers.stall_s = 0.0
        return store

    @property
    def stall_s(self) -> float:
        return self._readers.stall_s

    @property
    def damaged(self) -> bool:
        return self._readers.pack.damaged

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]:
        self._done = self._place.get(block, self._done)
        if (kept := self._kept.get(block)) is not None:
            return kept
        if block.kind == "expert":
            return _Lease(self._readers, self._slots, partial(self._experts.want, block))
        return _Lease(self._readers, self._ring, partial(self._window.want, block))

    def expect(self, blocks: Sequence[BlockId]) -> None:
        if any(block not in self._kept for block in blocks):
            self._readers.change(partial(self._experts.expect, blocks))

    def guess(self, blocks: Sequence[BlockId]) -> None:
        if any(block not in self._kept for block in blocks):
            self._readers.change(partial(self._experts.guess, blocks))

    def rows(self, block: BlockId, ids: Ids) -> Floats:
        self._done = 0
        if self._embedding is not None:
            return self._embedding.rows(self._readers, ids)
        return gather_rows(self._kept[block].weights.matrix["embed"], ids)

    def stage(self) -> Stage | None:
        if not self._streams:
            return None
        return Stage(self._done, len(self._place), *self._readers.bytes_per_s())

    def close(self) -> None:
        self._readers.close()

    def _pin(self, pack: Pack, progress: Callable[[int, int], None]) -> None:
        """Reads the blocks that stay."""
        passages: list[Passage] = []
        total = 0
        for block, offset, nbytes in self._pinned:
            passages.append(Passage(block, offset, total, nbytes))
            total += nbytes

        def keep(passage: Passage) -> None:
            self._kept[passage.block] = Resident(self._pins.region.weights(pack, passage))
            progress(passage.position + passage.nbytes, total)

        self._pins.fetch(self._readers, passages, keep)
        if self._embed_is_head:  # in its slices, which lie one behind the other
            start = next(passage.position for passage in passages if passage.block.kind == "head")
            whole = self._pins.region.memory[start : start + pack.blocks[BlockId("embed")].nbytes]
            self._kept[BlockId("embed")] = Resident(pack.weights(BlockId("embed"), whole))


def _extents(pack: Pack, blocks: Sequence[BlockId]) -> list[Extent]:
    found = []
    for block in blocks:
        packed = pack.blocks.get(block)
        if packed is None:
            raise StoreError(f"{pack.path}: the pack has no block {block}")
        found.append(Extent(block, packed.offset, packed.nbytes))
    return found
