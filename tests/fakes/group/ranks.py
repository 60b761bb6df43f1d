"""Helper: the ranks of a group in one process, each in a thread, with shards of one checkpoint in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from shoal.engine import leader
from shoal.engine.collective import PendingSum
from shoal.engine.executor import Executor
from shoal.engine.order import Order, Reading, Result, Segment
from shoal.engine.order_bytes import order_of
from shoal.engine.rank import Rank
from shoal.engine.sums_ahead import SumsAhead
from shoal.kernels import ComputeHome, home_of
from shoal.kernels.arrays import Bytes, Floats, Hidden
from shoal.kernels.cpu_home import CpuHome
from shoal.kernels.native_library import Native
from shoal.kernels.reference import ReferenceHome
from shoal.kernels.routing import Routing
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.models.transformer import Transformer
from shoal.offload.block_store import BlockStore, ResidentStore
from shoal.offload.kv.disk_index import Entry, Slot
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.disk_slots import KvSlots
from shoal.offload.kv.pool import KvPool
from shoal.offload.kv.prefix_cache import Copy, Save
from shoal.offload.pack.layout import grains_of
from shoal.partition.plan import BlockPlan, Plan
from shoal.partition.slicing import Shard, cut_rows, divide
from shoal.partition.spec import ModelSpec

PATIENCE_S = 60.0
LENGTH = 75  # more than a page
T = TypeVar("T")


class Together:
    """Where the ranks meet. Each brings an array, and all get all arrays, in the order of ranks."""

    def __init__(self, ranks: int) -> None:
        self._brought: list[Floats] = [np.empty(0, np.float32)] * ranks
        self._barrier = threading.Barrier(ranks, timeout=PATIENCE_S)

    def meet(self, rank: int, what: Floats) -> list[Floats]:
        self._brought[rank] = what
        self._barrier.wait()
        brought = list(self._brought)
        self._barrier.wait()  # or the next meeting might begin before everybody has looked
        return brought

    def leave(self) -> None:
        """A rank that failed calls this, so that nobody waits for it."""
        self._barrier.abort()


class Member:
    """The collective of one rank. `seen` are the bits of everything that it was given."""

    def __init__(self, together: Together, rank: int) -> None:
        self._together = together
        self._rank = rank
        self._ahead: SumsAhead | None = None
        self.started = 0  # sums that were made while this rank went on
        self.seen: list[bytes] = []

    def allreduce(self, home: ComputeHome, partial: Hidden) -> Hidden:
        if self._ahead is not None:
            return self.start(home, partial)()
        return home.place(self._sum(home.fetch(partial)))

    def _sum(self, partial: Floats) -> Floats:
        first, *others = self._together.meet(self._rank, partial)
        total: Floats = first.copy()
        for other in others:
            total += other
        self.seen.append(total.tobytes())
        return total

    def start(self, home: ComputeHome, partial: Hidden) -> PendingSum:
        self.started += 1
        self._ahead = self._ahead or SumsAhead(self._sum)
        begun = self._ahead.start(home.fetch(partial))
        return lambda: home.place(begun.result(PATIENCE_S))

    def settle(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def gather(self, columns: Floats) -> Floats:
        brought = self._together.meet(self._rank, columns)
        return columns[:, :0] if self._rank else np.concatenate(brought, axis=1)

    def broadcast(self, rows: Floats | None, shape: tuple[int, int]) -> Floats:
        assert (rows is None) == (self._rank > 0)
        first, *_ = self._together.meet(self._rank, np.empty(0, np.float32) if rows is None else rows)
        assert first.shape == shape
        self.seen.append(first.tobytes())
        return first.copy()

    def deal(self, parts: Sequence[Bytes], into: Bytes | None) -> None:
        raise NotImplementedError

    def collect(self, own: Bytes | None, into: Sequence[Bytes]) -> None:
        raise NotImplementedError


class Turns:
    """A home that computes only while no other does: the native library serves one instruction set at a time."""

    _lock = threading.Lock()

    def __init__(self, kernels: str) -> None:
        self._home = _of_kernels(kernels)
        self.chosen: list[
            tuple[list[int], list[int]]
        ] = []  # experts that tokens were sent to, and these tokens

    def route(self, scores: Floats, count: int, normalize: bool) -> Routing:
        routing = self._home.route(scores, count, normalize)
        self.chosen.append((routing.used, routing.routes.tokens.tolist()))
        return routing

    def __getattr__(self, name: str) -> Any:
        does = getattr(self._home, name)

        def alone(*operands: Any, **more: Any) -> Any:
            with self._lock:
                return does(*operands, **more)

        return alone


def _of_kernels(name: str) -> CpuHome:
    return ReferenceHome() if name == "reference" else Native(name)


Opened = Callable[[CheckpointShard, Plan], tuple[Plan, BlockStore]]


def resident(part: CheckpointShard, base: Plan) -> tuple[Plan, BlockStore]:
    """The plan of a rank that has everything in memory, and its store. `base` has the rest of the plan."""
    plan = replace(base, blocks=tuple(BlockPlan(block, 0) for block in part.spec.blocks()))
    return plan, ResidentStore.load(plan, part)


class Group:
    """A checkpoint divided among ranks. `base` has everything else of their plans; `how` says how it is divided.
    `homes`: where each rank computes, by default all in the home of this process. `opened`: where its weights come
    from. `member`: how a rank meets the others."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        base: Plan,
        ranks: int,
        shares: Sequence[float] = (),
        homes: Sequence[ComputeHome] = (),
        opened: Opened = resident,
        member: Callable[[Together, int], Member] | None = None,
        **how: Any,
    ) -> None:
        self._opened = opened
        self._homes = homes
        self._stores: list[BlockStore] = []
        self._together = Together(ranks)
        self.members = [(member or Member)(self._together, rank) for rank in range(ranks)]
        shards = divide(checkpoint.spec, ranks, grains_of(checkpoint, "keep"), shares, **how)
        self.ranks = [
            self._rank(CheckpointShard(checkpoint, shard), shard, base, member, checkpoint.spec)
            for shard, member in zip(shards, self.members, strict=True)
        ]
        self._threads = ThreadPoolExecutor(ranks)

    def _rank(
        self, part: CheckpointShard, shard: Shard, base: Plan, member: Member, whole: ModelSpec
    ) -> Rank:
        plan, store = self._opened(part, replace(base, threads=1, ranks=shard.ranks))
        self._stores.append(store)
        transformer = Transformer(part.spec)
        kv = KvPool(part.spec, plan.kv)
        devices = (lambda _: self._homes[shard.rank]) if self._homes else home_of
        executor = Executor(transformer, plan, store, kv, member, devices, cut_rows(whole, shard))
        return Rank(executor, clock=lambda: 0.0)

    def run(self, order: Order) -> list[Result]:
        """The result of an order on every rank. A rank without an embedding does not get to see the token ids, and
        ranks other than 0 not where texts are found on disk."""
        order = self.ranks[0].placed(order)
        told = replace(order, readings=[Reading(_slots(it.entries), it.pages) for it in order.readings])
        blind = replace(told, segments=[it._replace(tokens=[-1] * len(it.tokens)) for it in order.segments])

        def run(rank: Rank) -> Result:
            if rank is self.ranks[0]:
                return rank.run(order)
            return rank.run(told if rank.executor.model.spec.vocab else blind)

        return self._each(run)

    def close(self) -> None:
        for store in self._stores:
            store.close()

    def leave(self) -> None:
        """Nobody waits for anybody any more."""
        self._together.leave()

    def submit(self, do: Callable[[Rank], T], rank: Rank) -> Future[T]:
        def one() -> T:
            try:
                return do(rank)
            except BaseException:
                self.leave()
                raise

        return self._threads.submit(one)

    def _each(self, do: Callable[[Rank], T]) -> list[T]:
        return [running.result() for running in [self.submit(do, rank) for rank in self.ranks]]


def _slots(entries: Sequence[Entry | Slot]) -> list[Slot]:
    return [Slot(entry.slot, entry.digest) for entry in entries]


class Others:
    """The other ranks of a group as their leader reaches them: each gets orders as bytes, in a thread."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._running: list[Future[Result]] = []

    def begin(self, order: bytes) -> None:
        def follow(rank: Rank) -> Result:
            slots = rank.disk.slots if isinstance(rank.disk, KvSlots) else 0
            executor = rank.executor
            return rank.run(order_of(order, executor.plan, slots, tokens=executor.vocab is not None))

        self._running = [self._group.submit(follow, rank) for rank in self._group.ranks[1:]]

    def end(self) -> None:
        for running in self._running:
            running.result(PATIENCE_S)

    def give_up(self) -> None:
        self._group.leave()


class Leader(leader.Leader):
    """A group as an engine has it: rank 0, whose orders the others carry out, too."""

    def __init__(self, group: Group) -> None:
        first, *others = group.ranks
        disk = first.disk if isinstance(first.disk, KvDisk) else None
        slots = [it.disk.slots for it in others if isinstance(it.disk, KvSlots)]
        super().__init__(first.executor, lambda: 0.0, Others(group), disk, lambda: min(slots, default=0))
        self._group = group

    def close(self, known: Sequence[Save], keep_s: float = 10.0) -> None:
        super().close(known, keep_s)
        for rank in self._group.ranks[1:]:
            rank.close([])


def orders(vocab: int, seed: int) -> list[Order]:
    """Two texts: prompts in chunks, a text that goes on from a copied page, then decodes, some with wrong guesses."""
    source = np.random.default_rng(seed)
    first, second = (source.integers(vocab, size=LENGTH + 8).tolist() for _ in range(2))
    second[:40] = first[:40]
    return [
        Order([Segment(first[:50], 0, [0, 1], 0)]),
        Order([Segment(first[50:LENGTH], 50, [0, 1], 1)]),
        Order([Segment(second[40:LENGTH], 40, [2, 3], 3)], moves=[Copy(0, 2)]),
        *(
            Order([Segment(first[at : at + 1], at, [0, 1], 1), Segment(second[at : at + 3], at, [2, 3], 3)])
            for at in range(LENGTH, LENGTH + 5)
        ),
    ]
