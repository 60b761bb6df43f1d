"""Experts that lie with the CPU and come to a device for one step, a few at a time.

A step of many tokens uses each expert for many of them. From some number on, a device has multiplied by its weights,
once they have come, sooner than the CPU would have. Which number that is, and how many come together, says the plan.
Knows two buffers, in turns; which copy waits for what knows the home.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple

from shoal.kernels import ComputeHome
from shoal.kernels.arrays import Bytes, Floats
from shoal.kernels.compute_home import Staged
from shoal.models.weights import Weights
from shoal.partition.memory_layout import staged_starts
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId


class ExpertStaging:
    """Of a plan. `home_of` gives the home of a device. They come for `least_tokens` or more. Raises HomeFull and
    HomeLost."""

    def __init__(self, plan: Plan, home_of: Callable[[str], ComputeHome]) -> None:
        self.least_tokens, self._together = plan.staged_tokens, plan.staged_experts
        self._slot_bytes = plan.staged_slot_bytes
        self._home = home_of(plan.device) if self._together else None
        self._buffers: list[Bytes] = []
        if self._home is not None:
            self._buffers = [self._home.staging(self._together * self._slot_bytes) for _ in range(2)]

    def let_go(self) -> None:
        """Give the buffers' memory back."""
        self._home, self._buffers = None, []

    def pays(self, home: ComputeHome, tokens: int) -> bool:
        """Whether experts come to `home`, where their router is, for a step of so many tokens."""
        return home is self._home and tokens >= self.least_tokens

    def cut(self, blocks: Sequence[BlockId], coming: Collection[int]) -> Iterator[Sequence[BlockId]]:
        """Groups of these experts of a layer, in their order. Of each so many are `coming` as a buffer holds."""
        group: list[BlockId] = []
        slots = self._together
        for block in blocks:
            if block.expert in coming:
                if not slots:
                    yield group
                    group, slots = [], self._together
                slots -= 1
            group.append(block)
        yield group

    def brought(
        self, experts: Mapping[int, Weights], coming: Collection[int], number: int
    ) -> Mapping[int, Weights]:
        """Those of a layer's group of this number, of which some are `coming`: now, in one go."""
        assert self._home is not None
        starts = count(0, self._slot_bytes)
        buffer = self._buffers[number % 2]
        come = {
            expert: beside(self._home, its, buffer, next(starts), self._slot_bytes)
            for expert, its in experts.items()
            if expert in coming
        }
        if come:
            self._home.stage([it for its in come.values() for it in its.parts])
        return {**experts, **{expert: its.there for expert, its in come.items()}}


class OnItsWay(NamedTuple):
    """Weights of the host as they will be `there`, when their `parts` have been staged."""

    there: Weights
    parts: Sequence[Staged]


def beside(
    home: ComputeHome,
    weights: Weights,
    room: Bytes,
    start: int,
    room_bytes: int,
    vectors: Mapping[str, Floats] | None = None,
) -> OnItsWay:
    """The same weights in `room_bytes` from byte `start` of some memory of a device, one matrix behind the other, with
    vectors that are there already. Nothing is begun."""
    *starts, end = staged_starts([matrix.nbytes for matrix in weights.matrix.values()])
    assert end <= room_bytes, "a block is larger than planned"
    parts = [
        Staged(matrix, room, start + its) for matrix, its in zip(weights.matrix.values(), starts, strict=True)
    ]
    coming = iter(parts)
    return OnItsWay(weights.elsewhere(lambda matrix: home.staged(next(coming)), vectors), parts)
