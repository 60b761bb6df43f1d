"""Block stores: `acquire(block)` lends a block's weights for the length of a `with`.

The resident store keeps every block in RAM and never waits. This module knows blocks and their bytes; it does not
know what is computed with them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import NamedTuple, Protocol

from shoal.kernels import gather_rows
from shoal.kernels.arrays import Floats, Ids
from shoal.models.weights import Weights
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
        """The weights of several blocks, in this order, for the length of a `with`."""
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

    def read_blocks(self, blocks: Sequence[BlockId]) -> Arriving:
        """Reads all these blocks, in any order. A tied embedding and head share their bytes.
        Raises CheckpointError or OffloadError."""
        ...


class ResidentStore:
    """Keeps every block of a plan in memory. Once loaded it reads nothing, so it never waits and is never damaged."""

    stall_s = 0.0
    damaged = False

    def __init__(self, blocks: Mapping[BlockId, Resident]) -> None:
        self._blocks = blocks

    @classmethod
    def load(cls, plan: Plan, reader: BlockReader, progress: BytesDone = unheard) -> ResidentStore:
        """Reads all blocks and reports progress after each. Raises CheckpointError or OffloadError."""
        sizes = {item.block: item.nbytes for item in plan.blocks}
        return cls(keep(reader.read_blocks(list(sizes)), sizes, progress))

    def with_vocabulary_of(self, other: ResidentStore) -> ResidentStore:
        """These blocks, with the other store's embedding and head: the same memory."""
        more = {block: it for block, it in other._blocks.items() if block.kind in ("embed", "head")}
        return ResidentStore({**more, **self._blocks})

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]:
        return self._blocks[block]

    def acquire_all(self, blocks: Sequence[BlockId]) -> AbstractContextManager[list[Weights]]:
        return nullcontext([self._blocks[block].enter_result for block in blocks])

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


def keep(arriving: Arriving, sizes: Mapping[BlockId, int], progress: BytesDone) -> dict[BlockId, Resident]:
    """Collects blocks that stay in memory as they arrive. `sizes` gives the bytes of each."""
    blocks: dict[BlockId, Resident] = {}
    done, total = 0, sum(sizes.values())
    with closing(arriving):
        for block, weights in arriving:
            blocks[block] = Resident(weights)
            done += sizes[block]
            progress(done, total)
    return blocks
