"""Block stores: `acquire(block)` lends a block's weights for the length of a `with`.

The resident store keeps every block in RAM and never waits. This module knows blocks and their bytes; it does not
know what is computed with them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import NamedTuple, Protocol

from shoal.kernels import ComputeHome, gather_rows, home_of
from shoal.kernels.arrays import Floats, Ids
from shoal.kernels.compute_home import HERE
from shoal.models.weights import Weights
from shoal.partition.memory_layout import arena_slack
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

from .bytes_done import BytesDone, unheard

Arriving = Generator[tuple[BlockId, Weights], None, None]
"""Gives each block as soon as it has been read. Closing the generator ends the reading."""

Resident = nullcontext[Weights]
"""A lease that costs nothing, because the block never leaves memory."""


class ReadStage(NamedTuple):
    """How far a step has come, for people to read: `done` of the `blocks` that it passes, how fast bytes have come
    lately, and the best speed so far."""

    done: int
    blocks: int
    bytes_per_s: float
    best_bytes_per_s: float = 0.0


class Coming(NamedTuple):
    """A block's weights, for a copy that is begun now and made later. The bytes are there from when `lent` was entered
    until it is left, once, by any thread; entering raises OffloadError."""

    weights: Weights
    lent: AbstractContextManager[object] = HERE


class BlockStore(Protocol):
    """Where the executor gets weights from."""

    @property
    def stall_s(self) -> float:
        """Time that `acquire` and `rows` have waited since the store was ready."""
        ...

    @property
    def damaged(self) -> bool:
        """Whether the bytes it reads were found to differ from those that were written. It is of no use then."""
        ...

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]:
        """A block's weights for the length of a `with`. Raises OffloadError when they cannot be read."""
        ...

    def acquire_all(self, blocks: Sequence[BlockId]) -> AbstractContextManager[list[Weights]]:
        """The weights of several experts, in this order, for the length of a `with`. Raises OffloadError."""
        ...

    def coming(self, block: BlockId) -> Coming:
        """A block's weights, which may not be here yet. Blocks that come from disk are copied in the order of a step,
        each before the next."""
        ...

    def rows(self, block: BlockId, ids: Ids) -> Floats:
        """Rows of the embedding, f32 (T, hidden). Raises OffloadError when they cannot be read."""
        ...

    def expect(self, blocks: Sequence[BlockId]) -> None:
        """The caller will acquire these blocks next, in this order. A store that has to read them begins to."""
        ...

    def guess(self, blocks: Sequence[BlockId]) -> None:
        """The caller may acquire these blocks after the expected ones; the likeliest comes first."""
        ...

    def stage(self) -> ReadStage | None:
        """How far the step has come; None if nothing is read during compute. Any thread may call it."""
        ...

    def close(self) -> None:
        """Ends what runs in the background. Idempotent."""
        ...


class BlockReader(Protocol):
    """Reads the blocks that stay in memory, from a checkpoint (`models.checkpoint`) or from a pack."""

    def reserve(self, nbytes: int) -> None:
        """The blocks that are read next, of so many bytes together, all stay in memory: they get one piece of it."""
        ...

    def read_blocks(self, blocks: Sequence[BlockId]) -> Arriving:
        """Reads all these blocks, in any order. A tied embedding and head share their bytes.
        Raises CheckpointError or OffloadError."""
        ...


class ResidentStore:
    """Keeps every block of a plan in memory. Once loaded it reads nothing, so it never waits and is never damaged."""

    stall_s = 0.0
    damaged = False

    def __init__(self, blocks: Mapping[BlockId, Resident]) -> None:
        self._blocks = dict(blocks)

    @classmethod
    def load(
        cls,
        plan: Plan,
        reader: BlockReader,
        progress: BytesDone = unheard,
        home_of: Callable[[str], ComputeHome] = home_of,
    ) -> ResidentStore:
        """Reads all blocks, brings each to the home of its device (`home_of`), and reports progress after each. Raises
        CheckpointError or OffloadError, and KernelError where a device does not take them."""
        sizes = {item.block: item.nbytes for item in plan.blocks}
        away = {item.block: home_of(item.device) for item in plan.blocks if item.tier == "gpu"}
        if not away:  # else what goes away leaves room for what comes
            reader.reserve(plan.pinned_bytes + arena_slack(plan.pinned_bytes))
        arriving = reader.read_blocks(list(sizes))
        return cls(keep(placed(arriving, away) if away else arriving, Hearing(sizes, progress)))

    def with_vocabulary_of(self, other: ResidentStore) -> ResidentStore:
        """These blocks, with the other store's embedding and head: the same memory."""
        more = {block: it for block, it in other._blocks.items() if block.kind in ("embed", "head")}
        return ResidentStore({**more, **self._blocks})

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]:
        return self._blocks[block]

    def acquire_all(self, blocks: Sequence[BlockId]) -> AbstractContextManager[list[Weights]]:
        return nullcontext([self._blocks[block].enter_result for block in blocks])

    def coming(self, block: BlockId) -> Coming:
        return Coming(self._blocks[block].enter_result)

    def exchange(self, one: BlockId, other: BlockId, home: ComputeHome) -> None:
        """A block in a home's memory and one of this machine's, of one form, change places. Raises HomeLost."""
        mine, hosts = (self._blocks[block].enter_result for block in (one, other))
        for role, matrix in mine.matrix.items():
            home.exchange(matrix, hosts.matrix[role])
        self._blocks[one], self._blocks[other] = self._blocks[other], self._blocks[one]

    def rows(self, block: BlockId, ids: Ids) -> Floats:
        return gather_rows(self._blocks[block].enter_result.matrix["embed"], ids)

    def expect(self, blocks: Sequence[BlockId]) -> None:
        """Everything is here."""

    def guess(self, blocks: Sequence[BlockId]) -> None:
        """Everything is here."""

    def stage(self) -> ReadStage | None:
        return None

    def close(self) -> None:
        """Nothing runs in the background."""


def placed(arriving: Arriving, away: Mapping[BlockId, ComputeHome]) -> Arriving:
    """The same blocks; those that are computed `away` from the CPU are in the memory of their home."""
    with closing(arriving):
        for block, weights in arriving:
            yield block, weights.within(away[block]) if block in away else weights


class Hearing:
    """Tells `progress` of each block of so many bytes that has come."""

    def __init__(self, sizes: Mapping[BlockId, int], progress: BytesDone) -> None:
        self._sizes, self._progress = sizes, progress
        self._done, self._total = 0, sum(sizes.values())

    def came(self, block: BlockId) -> None:
        self._done += self._sizes[block]
        self._progress(self._done, self._total)


def keep(arriving: Arriving, heard: Hearing) -> dict[BlockId, Resident]:
    """Collects blocks that stay in memory as they arrive."""
    blocks: dict[BlockId, Resident] = {}
    with closing(arriving):
        for block, weights in arriving:
            blocks[block] = Resident(weights)
            heard.came(block)
    return blocks
