"""Block stores: `acquire(block)` lends a block's weights for the length of a `with`.

The resident store keeps every block in RAM and returns at once. Knows blocks and their bytes; not what is
computed with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from shoal.models.weights import Weights
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId


class BlockStore(Protocol):
    """Where the executor gets weights from."""

    stall_s: float  # time `acquire` has waited since the store was made

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]: ...


class BlockReader(Protocol):
    """What a store needs of a checkpoint (models.checkpoint has it)."""

    def read_block(self, block: BlockId) -> Weights: ...


class _Resident:
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

    def __init__(self, blocks: Mapping[BlockId, Weights]) -> None:
        embed, head = blocks[BlockId("embed")], blocks[BlockId("head")]
        if "head" not in head.matrix:
            head = Weights({**head.matrix, "head": embed.matrix["embed"]}, head.vector)
        self._leases = {block: _Resident(weights) for block, weights in blocks.items()}
        self._leases[BlockId("head")] = _Resident(head)

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
