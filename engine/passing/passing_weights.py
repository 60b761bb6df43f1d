"""Weights that lie on the host or on its disk and pass through a device's memory in every step, in the order in which
it uses them.

Each kind of block has two places there, in turns, as large as the largest of the kind. So while a layer is computed the
next one comes, and it comes as soon as nothing is begun any more with what its places had. It goes on from the last
layer of a step to the first of the next. Which copy waits for what knows the home; the copy, too, waits for a disk, not
who asks for it. They are page-locked where they lie, as far as the system lets.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from shoal.engine.expert_staging import brought
from shoal.kernels import ComputeHome
from shoal.kernels.arrays import Bytes, Floats
from shoal.models.weights import Weights
from shoal.offload.block_store import BlockStore
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId


class PassingWeights:
    """Of a plan. `store` has all blocks. Raises HomeFull and HomeLost."""

    def __init__(self, plan: Plan, store: BlockStore, home: ComputeHome) -> None:
        self._home = home
        self._store = store
        self._cycle = [it.block for it in plan.blocks if it.passes]
        rooms = plan.passing_rooms
        self._rooms = {place: [home.staging(nbytes) for _ in range(2)] for place, nbytes in rooms.items()}
        self._vectors: dict[BlockId, dict[str, Floats]] = {}  # they are small, and stay
        for block in self._cycle:
            its = store.coming(block).weights.vector.items()
            self._vectors[block] = {role: home.keep_vector(vector) for role, vector in its}
        staying = [it.block for it in plan.blocks if it.passes and it.tier == "ram"]
        self._locked = home.lock(_memory(store, staying))
        self._there: dict[BlockId, Weights] = {}  # have come, or are on their way
        self._free = {place: deque(both) for place, both in self._rooms.items()}
        self._held: dict[BlockId, Bytes] = {}
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
        self._rooms, self._free, self._held, self._vectors = {}, {}, {}, {}
        self._home.settle()
        if self._locked is not None:
            self._locked.release()

    def begin(self, users: int) -> None:
        """A step begins, in which each block is lent so many times. What has come already counts."""
        if self._left:  # the one before was given up
            self._start_anew()
        self._users = users
        self._left = Counter(dict.fromkeys(self._cycle, users))
        self._fetch()

    def end(self) -> None:
        """The step is over: nobody needs what was not lent."""
        for block in self._cycle:
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
        if (room := self._held.pop(block, None)) is not None:
            self._free[block.place].append(room)

    def _fetch(self) -> None:
        """Begin to bring what comes next, as far as there are places."""
        while True:
            block = self._cycle[self._next]
            if block in self._held or not (free := self._free[block.place]):
                return
            room = self._held[block] = free.popleft()
            coming = self._store.coming(block)
            self._there[block] = brought(self._home, coming, room, 0, room.nbytes, self._vectors[block])
            self._next = (self._next + 1) % len(self._cycle)

    def _start_anew(self) -> None:
        self._there.clear()
        self._held.clear()
        self._left.clear()
        self._free = {place: deque(both) for place, both in self._rooms.items()}
        self._next = 0


def _memory(store: BlockStore, blocks: Sequence[BlockId]) -> list[Bytes]:
    """In which the matrices of these blocks lie."""
    found: list[Bytes] = []
    for block in blocks:
        with store.acquire(block) as weights:
            found += [matrix.data for matrix in weights.matrix.values()]
    return found
