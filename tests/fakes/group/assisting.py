"""Helper: a rank 0 that has a whole model, and a group for its long orders, over hub and spokes in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
from fakes.group.ranks import Group
from fakes.group.streams import PairStream, stream_pair

from shoal.comm.group.sums.star import Hub, Spoke
from shoal.daemon.cluster.follower import Follower
from shoal.daemon.cluster.meeting import Led, Meeting
from shoal.daemon.cluster.pulse import Pulse
from shoal.engine.assisted import Assisted
from shoal.engine.collective import Alone
from shoal.engine.executor import Executor
from shoal.engine.passed_pages import frame_bytes
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.transformer import Transformer
from shoal.offload.block_store import ResidentStore
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.pool import KvPool
from shoal.offload.pack.layout import grains_of
from shoal.partition.plan import BlockPlan, Plan
from shoal.partition.slicing import divide

ASSISTED_PATIENCE_S = 10.0


class CountedOrders(Led):
    """The other ranks. `orders` are those that they have begun."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self.orders: list[bytes] = []

    def begin(self, order: bytes) -> None:
        self.orders.append(order)
        super().begin(order)


class Assisting:
    """`rank` is the one that is assisted. `base` has all of the plan but the blocks; orders of `group_rows` rows or
    more go to the group, and of `page_rows` more for each page that has to pass. `pages`: of the others, if not as many
    as rank 0 has. `lost` has what it was told."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        base: Plan,
        ranks: int,
        shares: Sequence[float] = (),
        *,
        group_rows: int = 8,
        page_rows: int = 0,
        pages: int | None = None,
        disk: Callable[[KvPool], KvDisk] | None = None,
        **how: Any,
    ) -> None:
        spec = checkpoint.spec
        plan = replace(base, threads=1, blocks=tuple(BlockPlan(block, 0) for block in spec.blocks()))
        kv = KvPool(spec, plan.kv)
        whole = Executor(Transformer(spec), plan, ResidentStore.load(plan, checkpoint), kv, Alone())
        divided = replace(base, group_rows=group_rows, page_rows=page_rows)
        if pages is not None:
            divided = replace(divided, kv=replace(base.kv, pages=pages))
        self.group = Group(checkpoint, divided, ranks, shares, **how)
        shards = divide(spec, ranks, grains_of(checkpoint, "keep"), shares, **how)
        self.kv_heads = [shard.ranges.kv_heads for shard in shards]
        pairs = [stream_pair() for _ in range(ranks - 1)]
        self._streams: list[PairStream] = [end for pair in pairs for end in pair]
        self.ended: SimpleQueue[str] = SimpleQueue()
        self.pulses = [Pulse(1) for _ in range(ranks)]
        share = self.group.ranks[0].executor
        frames = [frame_bytes(it.executor.model.spec, plan.kv.dtype) for it in self.group.ranks]
        hub = Hub([near for near, _ in pairs], 1, patience_s=ASSISTED_PATIENCE_S, most_collected=max(frames))
        share.collective = Meeting(hub, self.pulses[0])
        share.kv = kv.of_heads(self.kv_heads[0], share.model.spec.heads)
        self.others = CountedOrders(hub)
        self.lost: list[int] = []
        self.rank = Assisted(
            whole,
            lambda: 0.0,
            share,
            self.others,
            self.kv_heads,
            divided.kv.pages,
            disk(kv) if disk else None,
            lost=self.lost.append,
        )
        for rank, (_, far), pulse in zip(self.group.ranks[1:], pairs, self.pulses[1:], strict=True):
            spoke = Spoke(far, 1, patience_s=ASSISTED_PATIENCE_S)
            rank.executor.collective = Meeting(spoke, pulse)
            Follower(rank, spoke, pulse, self.ended.put).start()

    def assert_alike(self) -> None:
        """All ranks have the same K and V of the pages of which rank 0 thinks so, and rank 0 has them, too: those of a
        head that several ranks have of the first, as what is behind the end of a text may differ at the others."""
        until_s = time.monotonic() + ASSISTED_PATIENCE_S
        while any(pulse.at_work for pulse in self.pulses[1:]):
            assert time.monotonic() < until_s
            time.sleep(0.0005)
        whole, layers = self.rank.kv, len(self.rank.executor.model.spec.layers)
        for page in self.rank._alike:
            for number, (rank, heads) in enumerate(zip(self.group.ranks, self.kv_heads, strict=True)):
                if number and heads.start < self.kv_heads[number - 1].stop:
                    continue
                for layer in range(layers):
                    mine = whole.layer(page, layer, slice(*heads))
                    there = self.rank._copied.places[page] if number else page
                    assert np.array_equal(rank.executor.kv.layer(there, layer), mine), (page, layer)

    def cut(self, rank: int) -> None:
        for stream in self._streams[2 * rank - 2 : 2 * rank]:
            stream.close()

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self.group.close()
