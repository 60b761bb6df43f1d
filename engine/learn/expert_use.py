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
    """In how many parts of steps each expert was used, beginning with what is known."""

    def __init__(self, known: UseCounts = NONE_YET) -> None:
        self._unseen = 0  # parts that were noted since `seen`
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
        self._unseen += 1
        self._uses.update(blocks)
        layer = blocks[0].layer
        self._parts[layer] += 1
        if self._parts[layer] >= FADING:
            self._parts[layer] //= 2
            for block in [it for it in self._uses if it.layer == layer]:
                self._uses[block] //= 2

    @property
    def uses(self) -> Mapping[BlockId, int]:
        """By expert. Only who notes may ask."""
        return self._uses

    @property
    def fresh(self) -> bool:
        """Whether so much was noted since `seen` that an exchange may have become worth it."""
        return self._unseen > LEAST_USES * len(self._parts)

    def seen(self) -> None:
        self._unseen = 0


def worth_an_exchange(uses: Mapping[BlockId, int], pair: ExpertPair) -> bool:
    """Whether what the CPU is spared is more than chance."""
    going, coming = (uses.get(block, 0) for block in pair)
    return coming - going >= LEAST_USES and coming >= TIMES_AS_OFTEN * going


def all_exchanges(
    uses: Mapping[BlockId, int], there: Collection[BlockId], forms: Mapping[BlockId, Hashable]
) -> list[ExpertPair]:
    """The exchanges that are worth it, until none is left: the device's least used experts with the CPU's most used
    ones, form by form. What spares the CPU most comes first. uses: of all experts; there: those on the device; forms:
    what two have to have in common to change places."""
    parted: dict[Hashable, tuple[list[BlockId], list[BlockId]]] = {}
    for block, form in forms.items():
        parted.setdefault(form, ([], []))[block not in there].append(block)
    found: list[ExpertPair] = []
    for device, cpu in parted.values():
        device.sort(key=lambda block: uses.get(block, 0))
        cpu.sort(key=lambda block: -uses.get(block, 0))
        pairs = (ExpertPair(*pair) for pair in zip(device, cpu, strict=False))
        found += takewhile(lambda pair: worth_an_exchange(uses, pair), pairs)
    return sorted(found, key=lambda it: uses.get(it.from_device, 0) - uses[it.from_cpu])
