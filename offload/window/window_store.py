"""The store of a plan that streams: some blocks stay in memory, the others are read ahead of need through a window.

Reading goes on during compute, during sampling and between steps; after the last block comes the first. This module
knows which memory a plan's blocks use. The policies (`window`, `expert_cache`) decide what is read when, and `readers`
read it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MappingProxyType

from shoal.kernels import ComputeHome, gather_rows, home_of
from shoal.kernels.arrays import Floats, Ids
from shoal.kernels.huge_pages import Arena
from shoal.models.weights import Weights
from shoal.offload.block_store import Coming, Hearing, ReadStage, Resident, keep, placed
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.errors import StoreError
from shoal.offload.pack.pack import Pack
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

from .embedding import Embedding
from .expert_cache import ExpertCache
from .pinned import EMBED, PackReader, Pinned, located
from .readers import Readers, Region
from .window import Passage, Window


class _Lease:
    """A lease of a block in a region: entering waits for the block, leaving gives it back."""

    __slots__ = ("_pack", "_passage", "_readers", "_region", "_want")

    def __init__(
        self, pack: Pack, readers: Readers, region: Region, want: Callable[[], Passage | None]
    ) -> None:
        self._pack = pack
        self._readers = readers
        self._region = region
        self._want = want

    def __enter__(self) -> Weights:
        self._passage = self._readers.lease(self._region, self._want)
        return self._region.weights(self._pack, self._passage)

    def __exit__(self, *_: object) -> None:
        self._readers.give_back(self._region, [self._passage])


class WindowStore:
    """A `BlockStore`. One thread acquires, and it or that of a device's copies holds one block of the window at a time.
    Any thread may call `stage` and `close`."""

    def __init__(self, plan: Plan, pack: Pack, known: Mapping[BlockId, float] = MappingProxyType({})) -> None:
        """Takes memory and begins to read the blocks that pass through the window, and experts that were used often
        before (`known`: in which share of steps). Raises StoreError when the pack lacks a block or the plan has no
        place for one."""
        pinned = [item.block for item in plan.blocks if item.tier == "ram"]
        streamed = [item.block for item in plan.blocks if item.tier == "disk" and item.block.kind != "embed"]
        slotted = {item.block for item in plan.blocks if item.slotted}
        cycle = located(pack, (block for block in streamed if block not in slotted))
        experts = located(pack, (block for block in streamed if block in slotted))
        if any(extent.nbytes > plan.window_bytes for extent in cycle):
            raise StoreError(f"a window of {plan.window_bytes} bytes cannot hold the largest block streamed")
        if experts and not plan.expert_slots:
            raise StoreError(f"{len(experts)} experts are on disk, but the plan has no slots for them")
        arena = Arena()
        self._pack = pack
        self._pinned = Pinned(pack, pinned)
        gathers = any(item.block == EMBED and item.tier == "disk" for item in plan.blocks)
        self._embedding = Embedding(pack) if gathers else None
        slot_bytes = max((extent.nbytes for extent in experts), default=0)
        self._experts = ExpertCache(plan.expert_slots, slot_bytes, experts, known=known)
        self._slots = Region(self._experts, arena.take(plan.expert_slots * slot_bytes), slots=True)
        self._window = Window(plan.window_bytes, cycle)
        self._ring = Region(self._window, arena.take(plan.window_bytes))
        self._slotted = slotted
        self._slotted_layers = {block.layer for block in slotted}
        self._streams = bool(cycle or experts)
        self._kept: Mapping[BlockId, Resident] = {}
        blocks = [item.block for item in plan.blocks if item.block.kind not in ("embed", "expert")]
        self._place = {block: i + 1 for i, block in enumerate(blocks)}
        self._done = 0  # how many of these this step has passed
        gathered = [self._embedding.region] if self._embedding is not None else []
        # Regions that somebody waits for go first.
        self._readers = Readers(pack, [*gathered, self._pinned.region, self._slots, self._ring])

    @classmethod
    def open(
        cls,
        plan: Plan,
        pack: Pack,
        progress: BytesDone = unheard,
        home_of: Callable[[str], ComputeHome] = home_of,
        known: Mapping[BlockId, float] = MappingProxyType({}),
    ) -> WindowStore:
        """A store that has read the blocks that stay: in memory, or in that of their device's home (`home_of`), which
        come first; `progress` hears of each. Raises OffloadError, and KernelError where a device does not take them."""
        sizes = {item.block: item.nbytes for item in plan.blocks if item.tier != "disk"}
        away = {item.block: home_of(item.device) for item in plan.blocks if item.tier == "gpu"}
        hear = Hearing(sizes, progress)
        there = keep(placed(PackReader(pack, away).read_blocks(list(away)), away), hear) if away else {}
        store = cls(plan, pack, known)
        try:
            store._kept = {**there, **keep(store._pinned.arriving(store._readers), hear)}
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
        return self._pack.damaged

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]:
        self._done = self._place.get(block, self._done)
        if (kept := self._kept.get(block)) is not None:
            return kept
        if block in self._slotted:
            return _Lease(self._pack, self._readers, self._slots, partial(self._experts.want, block))
        return _Lease(self._pack, self._readers, self._ring, partial(self._window.want, block))

    def coming(self, block: BlockId) -> Coming:
        if (kept := self._kept.get(block)) is not None:
            return Coming(kept.enter_result)
        assert block not in self._slotted, "an expert has no place of its own"
        lease = self.acquire(block)
        return Coming(self._ring.weights(self._pack, self._window.place(block)), lease)

    @contextmanager
    def acquire_all(self, blocks: Sequence[BlockId]) -> Generator[list[Weights], None, None]:
        wants = [partial(self._experts.want, block) for block in blocks if block not in self._kept]
        passages = self._readers.lease_all(self._slots, wants)
        try:
            coming = iter(passages)
            yield [
                kept.enter_result
                if (kept := self._kept.get(block))
                else self._slots.weights(self._pack, next(coming))
                for block in blocks
            ]
        finally:
            self._readers.give_back(self._slots, passages)

    def expect(self, blocks: Sequence[BlockId]) -> None:
        if any(block.layer in self._slotted_layers for block in blocks):
            self._readers.change(partial(self._experts.expect, blocks))

    def guess(self, blocks: Sequence[BlockId]) -> None:
        if any(block not in self._kept for block in blocks):
            self._readers.change(partial(self._experts.guess, blocks))

    def rows(self, block: BlockId, ids: Ids) -> Floats:
        self._done = 0
        if self._embedding is not None:
            return self._embedding.rows(self._readers, ids)
        return gather_rows(self._kept[block].enter_result.matrix["embed"], ids)

    def stage(self) -> ReadStage | None:
        if not self._streams:
            return None
        return ReadStage(self._done, len(self._place), *self._readers.bytes_per_s())

    def close(self) -> None:
        self._readers.close()
