"""Block stores: `acquire(block)` lends a block's weights for the length of a `with`.

The resident store keeps every block in RAM and returns at once. Knows blocks and their bytes; not what is
computed with them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from typing import NamedTuple, Protocol

from shoal.kernels import gather_rows
from shoal.kernels.arrays import Floats, Ids
from shoal.models.weights import Weights
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

from .bytes_done import BytesDone, unheard

Arriving = Generator[tuple[BlockId, Weights], None, None]
"""Blocks, each as soon as it is read. Closing it ends the reading."""


class ReadStage(NamedTuple):
    """How far a step is, for people: blocks read of those that a step reads, how fast lately, and at best so far."""

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
        """Whether what it reads from was found to be another than was written: it is no good any more."""
        ...

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]:
        """A block's weights for the length of a `with`. Raises OffloadError when they cannot be read."""
        ...

    def rows(self, block: BlockId, ids: Ids) -> Floats:
        """Rows of the embedding, f32 (T, hidden). Raises OffloadError when they cannot be read."""
        ...

    def expect(self, blocks: Sequence[BlockId]) -> None:
        """These will be acquired next, in this order: a store that has to read them begins."""
        ...

    def guess(self, blocks: Sequence[BlockId]) -> None:
        """These may be acquired after what is expected, the likeliest first."""
        ...

    def stage(self) -> ReadStage | None:
        """None when nothing is read while computing. For any thread."""
        ...

    def close(self) -> None:
        """Ends what runs in the background; idempotent."""
        ...


class BlockReader(Protocol):
    """Where blocks come from that stay in memory: a checkpoint (models.checkpoint has it), or a pack."""

    def read_blocks(self, blocks: Sequence[BlockId]) -> Arriving:
        """All these blocks, in any order; embedding and head share their bytes where they
        are tied. Raises CheckpointError or OffloadError."""
        ...


class Resident:
    """A lease that costs nothing: the block never leaves."""

    __slots__ = ("weights",)

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def __enter__(self) -> Weights:
        return self.weights

    def __exit__(self, *_: object) -> None:
        return None


class ResidentStore:
    """Every block of a plan in memory. Reads nothing any more, so it never waits and cannot be damaged."""

    stall_s = 0.0
    damaged = False

    def __init__(self, blocks: Mapping[BlockId, Resident]) -> None:
        self._blocks = blocks

    @classmethod
    def load(cls, plan: Plan, reader: BlockReader, progress: BytesDone = unheard) -> ResidentStore:
        """Reads all blocks and tells of each. Raises CheckpointError or OffloadError."""
        sizes = {item.block: item.nbytes for item in plan.blocks}
        return cls(keep(reader.read_blocks(list(sizes)), sizes, progress))

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]:
        return self._blocks[block]

    def rows(self, block: BlockId, ids: Ids) -> Floats:
        return gather_rows(self._blocks[block].weights.matrix["embed"], ids)

    def expect(self, blocks: Sequence[BlockId]) -> None:
        """Everything is here."""

    def guess(self, blocks: Sequence[BlockId]) -> None:
        """Everything is here."""

    def stage(self) -> ReadStage | None:
        return None

    def close(self) -> None:
        """Nothing runs in the background."""


def keep(arriving: Arriving, sizes: Mapping[BlockId, int], progress: BytesDone) -> dict[BlockId, Resident]:
    """Blocks that stay, as they arrive; `sizes` of all of them, in bytes."""
    blocks: dict[BlockId, Resident] = {}
    done, total = 0, sum(sizes.values())
    with closing(arriving):
        for block, weights in arriving:
            blocks[block] = Resident(weights)
            done += sizes[block]
            progress(done, total)
    return blocks
