"""Which blocks of a streaming plan stay, pass through the window, or share slots, and where in the pack they lie.

Pure: knows a plan and the places in a pack. Takes no memory, reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from shoal.offload.errors import StoreError
from shoal.offload.pack.pack import Pack
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

from .window import Extent


class Placement(NamedTuple):
    """`cycle`: in the order of a step. `gathered`: rows of the embedding come from disk."""

    pinned: list[BlockId]
    cycle: list[Extent]
    experts: list[Extent]
    gathered: bool


def placement(plan: Plan, pack: Pack) -> Placement:
    """Raises StoreError when the pack lacks a block, or the plan a place for one."""
    streamed = [item.block for item in plan.blocks if item.tier == "disk"]
    cycle = extents(pack, (block for block in streamed if block.kind not in ("embed", "expert")))
    experts = extents(pack, (block for block in streamed if block.kind == "expert"))
    if any(extent.nbytes > plan.window_bytes for extent in cycle):
        raise StoreError(f"a window of {plan.window_bytes} bytes cannot hold the largest block streamed")
    if experts and not plan.expert_slots:
        raise StoreError(f"{len(experts)} experts are on disk, but the plan has no slots for them")
    pinned = [item.block for item in plan.blocks if item.tier == "ram"]
    return Placement(pinned, cycle, experts, BlockId("embed") in streamed)


def extents(pack: Pack, blocks: Iterable[BlockId]) -> list[Extent]:
    """Where in the pack the blocks lie. Raises StoreError when it does not have them."""
    found = []
    for block in blocks:
        packed = pack.blocks.get(block)
        if packed is None:
            raise StoreError(f"{pack.path}: the pack has no block {block}")
        found.append(Extent(block, packed.offset, packed.nbytes))
    return found
