"""Which experts steps use, and which of the CPU's should therefore change places with a device's.

A step that uses an expert reads it once, however many tokens it has. So what counts is in how many steps, and parts of
steps, an expert was used. Knows counts, not where weights are. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

from shoal.partition.spec import BlockId

TIMES_AS_OFTEN = 2.0  # as the device's one the CPU's one has to be used, or two of a kind would go to and fro
LEAST_USES = 32  # more it has to have, or it is chance
FADING = 4096  # parts of steps, after which all counts are halved: what is asked for changes


class ExpertPair(NamedTuple):
    """Two experts of one form that change places."""

    from_device: BlockId
    from_cpu: BlockId


class ExpertUse:
    """In how many parts of steps each expert was used. `fresh`: any was, since somebody set this to False."""

    def __init__(self) -> None:
        self.fresh = False
        self._uses: Counter[BlockId] = Counter()
        self._parts: Counter[int] = Counter()  # of steps, by layer

    def note(self, blocks: Sequence[BlockId]) -> None:
        """A part of a step used these experts of one layer, at least one, each named once."""
        self.fresh = True
        self._uses.update(blocks)
        layer = blocks[0].layer
        self._parts[layer] += 1
        if self._parts[layer] >= FADING:
            self._parts[layer] //= 2
            for block in [it for it in self._uses if it.layer == layer]:
                self._uses[block] //= 2

    def of(self, block: BlockId) -> int:
        return self._uses[block]


def best_exchange(
    uses: Mapping[BlockId, int], there: Collection[BlockId], forms: Mapping[BlockId, Hashable]
) -> ExpertPair | None:
    """The exchange that spares the CPU most, if one is worth it. uses: of all experts; there: those on the device;
    forms: what two have to have in common to change places."""
    hottest: dict[Hashable, BlockId] = {}
    coldest: dict[Hashable, BlockId] = {}
    for block, count in uses.items():
        form = forms[block]
        if block in there:
            if form not in coldest or count < uses[coldest[form]]:
                coldest[form] = block
        elif form not in hottest or count > uses[hottest[form]]:
            hottest[form] = block
    found = [ExpertPair(coldest[form], block) for form, block in hottest.items() if form in coldest]
    spared = {it: uses[it.from_cpu] - uses[it.from_device] for it in found}
    worth = [
        it
        for it in found
        if spared[it] >= LEAST_USES and uses[it.from_cpu] >= TIMES_AS_OFTEN * uses[it.from_device]
    ]
    return max(worth, key=spared.__getitem__, default=None)
