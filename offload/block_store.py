"""Block stores: `acquire(block)` lends a block's weights for the length of a `with`.

The resident store keeps every block in RAM and returns at once. Knows blocks and their bytes; not what is
computed with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from shoal.kernels import gather_rows
from shoal.kernels.arrays import Floats, Ids
from shoal.models.weights import Weights
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId


class Stage(NamedTuple):
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

    def stage(self) -> Stage | None:
        """None when nothing is read while computing. For any thread."""
        ...

    def close(self) -> None:
        """Ends what runs in the background; idempotent."""
        ...


class BlockReader(Protocol):
    """What a store needs of a checkpoint (models.checkpoint has it)."""

    def read_block(self, block: BlockId) -> Weights: ...


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
    """Every block of the plan in RAM. A head that is tied to the embedding shares its bytes."""

    stall_s = 0.0
    damaged = False

    def __init__(self, blocks: Mapping[BlockId, Weights]) -> None:
        embed, head = blocks[BlockId("embed")], blocks[BlockId("head")]
        if "head" not in head.matrix:
            head = Weights({**head.matrix, "head": embed.matrix["embed"]}, head.vector)
        self._leases = {block: Resident(weights) for block, weights in blocks.items()}
        self._leases[BlockId("head")] = Resident(head)

    @classmethod
    def load(
        cls, plan: Plan, reader: BlockReader, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> ResidentStore:
        """Read all blocks; `progress(bytes done, bytes in all)` is called after each."""
        blocks: dict[BlockId, Weights] = {}
        done = 0
        for item in plan.blocks:
            blocks[item.block] = reader.read_block(item.block)
            done += item.nbytes
            progress(done, plan.weights_bytes)
        return cls(blocks)

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]:
        return self._leases[block]

    def rows(self, block: BlockId, ids: Ids) -> Floats:
        return gather_rows(self._leases[block].weights.matrix["embed"], ids)

    def expect(self, blocks: Sequence[BlockId]) -> None:
        """Everything is here."""

    def guess(self, blocks: Sequence[BlockId]) -> None:
        """Everything is here."""

    def stage(self) -> Stage | None:
        return None

    def close(self) -> None:
        """Nothing runs in the background."""
