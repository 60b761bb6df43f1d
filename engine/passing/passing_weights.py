"""Weights that lie on the host or on its disk and pass through a device's memory, in every step or in long ones, in the
order in which it uses them.

Each kind of block has two places there, in turns, as large as the largest of the kind. So while a layer is computed the
next one comes, and it comes as soon as nothing is begun any more with what its places had. It goes on from the last
layer of a step to the first of the next. A layer's experts that lie in memory come in one copy, as they are used
together. Which copy waits for what knows the home; the copy, too, waits for a disk, not who asks for it. Blocks are
page-locked where they lie, as far as the system lets.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import groupby

from shoal.engine.expert_staging import OnItsWay, beside
from shoal.kernels import ComputeHome
from shoal.kernels.arrays import Bytes, Floats
from shoal.models.weights import Weights
from shoal.offload.block_store import BlockStore
from shoal.partition.plan import BlockPlan, Plan
from shoal.partition.spec import BlockId

_PLACES = 2


class PassingWeights:
    """Of a plan. `store` has all blocks. Raises HomeFull and HomeLost."""

    def __init__(self, plan: Plan, store: BlockStore, home: ComputeHome) -> None:
        self._home = home
        self._store = store
        passing = plan.coming
        self._cycle = [*_together(passing)]
        rooms = plan.passing_rooms
        self._rooms = {
            place: [home.staging(nbytes) for _ in range(_PLACES)] for place, nbytes in rooms.items()
        }
        self._vectors: dict[BlockId, dict[str, Floats]] = {}  # they are small, and stay
        for it in passing:
            its = store.coming(it.block).weights.vector.items()
            self._vectors[it.block] = {role: home.keep_vector(vector) for role, vector in its}
        self._locked = home.lock(_memory(store, [it.block for it in passing if it.tier == "ram"]))
        # To each place; made once, since kernels keep what they work out of weights.
        self._ways: dict[tuple[BlockId, int], OnItsWay] = {}
        self._there: dict[BlockId, Weights] = {}  # have come, or are on their way
        self._held: dict[BlockId, int] = {}  # which of its places a block has
        self._free = self._all_free()
        self._next = 0  # in the cycle, to come
        self._users = 0  # of each block, in the step
        self._left: Counter[BlockId] = Counter()

    @property
    def trouble(self) -> str:
        """Why not all of them are copied from where they lie; "" if they are, or where nothing is page-locked."""
        return self._locked.trouble if self._locked is not None else ""

    def let_go(self) -> None:
        """Nothing comes any more, also of what was begun for a step that never came: give the memory on the device
        back, and that of the host to the system. Idempotent."""
        if not self._rooms:
            return
        self._there.clear()
        self._ways.clear()
        self._rooms, self._free, self._held, self._vectors = {}, {}, {}, {}
        self._home.settle()
        if self._locked is not None:
            self._locked.release()

    def begin(self, users: int) -> None:
        """A step begins, in which each block is lent so many times. What has come already counts."""
        if self._left:  # the one before was given up
            self._start_anew()
        self._users = users
        self._left = Counter(dict.fromkeys(self._vectors, users))
        self._fetch()

    def end(self) -> None:
        """The step is over: nobody needs what was not lent."""
        for block in self._vectors:
            if self._left.pop(block, 0):
                self._give_up(block)
        self._fetch()

    def lend(self, block: BlockId) -> Weights:
        """A block on its way to the device, for which computations with it wait; or one that stays there."""
        if block in self._vectors:
            return self._there[block]
        with self._store.acquire(block) as weights:
            return weights

    def lent(self, *blocks: BlockId) -> None:
        """Somebody has begun all that these were lent for."""
        for block in blocks:
            if block not in self._vectors:
                continue
            self._left[block] -= 1
            if not self._left[block]:
                del self._left[block]
                self._give_up(block)
        self._fetch()

    def _give_up(self, block: BlockId) -> None:
        self._there.pop(block, None)
        if (place := self._held.pop(block, None)) is not None:
            self._free[block.place].append(place)

    def _fetch(self) -> None:
        """Begin to bring what comes next, as far as there are places."""
        while True:
            blocks = self._cycle[self._next]
            if any(block in self._held or not self._free[block.place] for block in blocks):
                return
            coming = [self._store.coming(block) for block in blocks]
            ways = []
            for block, its in zip(blocks, coming, strict=True):
                place = self._held[block] = self._free[block.place].popleft()
                ways.append(self._way(block, place, its.weights))
                self._there[block] = ways[-1].there
            self._home.stage([part for way in ways for part in way.parts], coming[0].lent)
            self._next = (self._next + 1) % len(self._cycle)

    def _way(self, block: BlockId, place: int, weights: Weights) -> OnItsWay:
        way = self._ways.get((block, place))
        if way is None:
            room: Bytes = self._rooms[block.place][place]
            way = beside(self._home, weights, room, 0, room.nbytes, self._vectors[block])
            self._ways[block, place] = way
        return way

    def _start_anew(self) -> None:
        self._there.clear()
        self._held.clear()
        self._left.clear()
        self._free = self._all_free()
        self._next = 0

    def _all_free(self) -> dict[tuple[str, int], deque[int]]:
        return {place: deque(range(_PLACES)) for place in self._rooms}


def _together(passing: Sequence[BlockPlan]) -> Iterator[list[BlockId]]:
    """Blocks that come in one copy: a layer's experts that lie in memory one behind the other, any other alone. What
    comes from disk is lent one block at a time."""
    for (tier, kind, _), its in groupby(passing, lambda it: (it.tier, it.block.kind, it.block.layer)):
        blocks = [it.block for it in its]
        if tier == "ram" and kind == "expert":
            yield blocks
        else:
            yield from ([block] for block in blocks)


def _memory(store: BlockStore, blocks: Sequence[BlockId]) -> list[Bytes]:
    """In which the matrices of these blocks lie."""
    found: list[Bytes] = []
    for block in blocks:
        with store.acquire(block) as weights:
            found += [matrix.data for matrix in weights.matrix.values()]
    return found
