"""Which experts steps use, and which of the CPU's should therefore change places with a device's.

A step that uses an expert reads it once, however many tokens it has. So what counts is in how many steps, and parts of
steps, an expert was used. Knows counts, not where weights are. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from shoal.partition.spec import BlockId

TIMES_AS_OFTEN = 2.0  # as the device's one the CPU's one has to be used, or two of a kind would go to and fro
LEAST_USES = 32  # more it has to have, or it is chance
FADING = 4096  # parts of steps, after which all counts are halved: what is asked for changes


class ExpertPair(NamedTuple):
    """Two experts of one form that change places."""

    from_device: BlockId
    from_cpu: BlockId


class UseCounts(NamedTuple):
    """In how many of the `parts` of steps, by layer, each expert was used: at most in all, which are less than
    FADING."""

    uses: Mapping[BlockId, int]
    parts: Mapping[int, int]

    @property
    def shares(self) -> dict[BlockId, float]:
        """In which share of the parts of its layer each was used."""
        return {block: count / self.parts[block.layer] for block, count in self.uses.items() if count}


NONE_YET = UseCounts({}, {})


class ExpertUse:
    """In how many parts of steps each expert was used, beginning with what is known. `fresh`: any was, since somebody
    set this to False."""

    def __init__(self, known: UseCounts = NONE_YET) -> None:
        self.fresh = False
        self._uses = Counter(known.uses)
        self._parts = Counter(known.parts)

    @property
    def counts(self) -> UseCounts:
        """As they are now. Any thread may ask, also while a part of a step is half noted: what would not fit together
        then is cut off."""
        uses, parts = dict(self._uses), dict(self._parts)
        parts = {layer: min(count, FADING - 1) for layer, count in parts.items()}
        return UseCounts({it: min(count, parts.get(it.layer, 0)) for it, count in uses.items()}, parts)

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


def worth_an_exchange(uses: Mapping[BlockId, int], pair: ExpertPair) -> bool:
    """Whether what the CPU is spared is more than chance."""
    going, coming = (uses.get(block, 0) for block in pair)
    return coming - going >= LEAST_USES and coming >= TIMES_AS_OFTEN * going


def all_exchanges(
    uses: Mapping[BlockId, int], there: Collection[BlockId], forms: Mapping[BlockId, Hashable]
) -> list[ExpertPair]:
    """What `best_exchange` finds, again and again until nothing is left: the device's least used experts with the
    CPU's most used ones, form by form."""
    parted: dict[Hashable, tuple[list[BlockId], list[BlockId]]] = {}
    for block, form in forms.items():
        parted.setdefault(form, ([], []))[block not in there].append(block)
    found: list[ExpertPair] = []
    for device, cpu in parted.values():
        device.sort(key=lambda block: uses.get(block, 0))
        cpu.sort(key=lambda block: -uses.get(block, 0))
        pairs = (ExpertPair(*pair) for pair in zip(device, cpu, strict=False))
        found += takewhile(lambda pair: worth_an_exchange(uses, pair), pairs)
    return found


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
    worth = [it for it in found if worth_an_exchange(uses, it)]
    return max(worth, key=lambda it: uses[it.from_cpu] - uses[it.from_device], default=None)
