"""Which blocks stay in memory if not all fit, how large the window for the others is, and how many slots experts get.

Every token needs every dense block, in the same order, so the bytes that are read do not depend on which of them stay.
As many stay as fit, spread evenly, so that blocks are read while their pinned neighbours compute. The largest kind of
blocks is pinned first, because the window must hold the largest block that streams. An embedding need not stay, because
its rows are gathered. Experts are not asked for in any order: they get equal slots, after everything else has its
place. Pure: knows sizes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice, pairwise, takewhile
from operator import attrgetter
from typing import NamedTuple

from .spec import BlockId, ModelSpec


class Pinning(NamedTuple):
    """Which blocks stay, and what the others pass through."""

    pinned: frozenset[BlockId]
    window_bytes: int
    expert_slots: int
    streamed_bytes: int  # for one token alone, if all experts are equally likely


class Pinnings:
    """All ways to pin blocks of one model. extents: bytes of its blocks in a pack. keeps_head: only those in which all
    of the head stays."""

    def __init__(self, spec: ModelSpec, extents: Mapping[BlockId, int], *, keeps_head: bool = False) -> None:
        kinds: dict[str, list[tuple[BlockId, int]]] = {}
        for block, nbytes in extents.items():
            if block.kind not in ("embed", "expert"):
                kinds.setdefault(block.kind, []).append((block, nbytes))
        self._kept = dict(kinds.pop("head", ()) if keeps_head else ())
        self._kept_bytes = sum(self._kept.values())
        self._kinds = sorted(map(_Kind, kinds.values()), key=lambda kind: -kind.largest_bytes)
        self._lead = next((place for place, kind in enumerate(self._kinds) if kind.of_layers), 0)
        self._dense_bytes = sum(nbytes for kind in self._kinds for _, nbytes in kind.blocks)
        experts = [nbytes for block, nbytes in extents.items() if block.kind == "expert"]
        self._experts, self._expert_bytes = len(experts), max(experts, default=0)
        self._active = moe.active if (moe := spec.moe) else 0
        self._active_here = moe.active * len(moe.own) / moe.experts if moe else 0.0  # of a token, on average
        self._moe_layers = self._experts / max(1, len(moe.own)) if moe else 0.0  # with all their experts here

        @cache
        def pinned_bytes(kind: _Kind, count: int, leads: int) -> int:
            if kind.alike:
                return count * kind.largest_bytes
            return sum(nbytes for _, nbytes in self._pinned(kind, count, leads))

        self._candidates: list[_Candidate] = []
        for counts in _counts(self._kinds) if self._kinds else [()]:
            each = zip(self._kinds, counts, strict=True)
            pinned = sum(pinned_bytes(kind, count, counts[self._lead]) for kind, count in each)
            self._candidates.append(_Candidate(counts, self._dense_bytes - pinned, *self._windows(counts)))
        self._candidates.sort(key=_streamed_bytes)

    def best(self, room_bytes: int, window_bytes: int) -> Pinning | None:
        """The way that streams least within `room_bytes`; None if nothing fits. The window has `window_bytes`, unless
        blocks need more or have no use for them."""
        slots = min(self._active, self._experts)
        room_bytes -= self._kept_bytes
        room_dense = room_bytes - slots * self._expert_bytes
        first = bisect_left(self._candidates, self._dense_bytes - room_dense, key=_streamed_bytes)
        windows = (
            (it.streamed_bytes, it.window_bytes(window_bytes), it.counts)
            for it in islice(self._candidates, first, None)
        )
        fitting = (it for it in windows if self._dense_bytes - it[0] + it[1] <= room_dense)
        least = next(fitting, None)
        if least is None:
            return None
        alike = takewhile(lambda it: it[0] == least[0], fitting)
        streamed, window, counts = min((least, *alike))
        if self._experts:
            if not streamed:
                slots = min(self._experts, (room_bytes - self._dense_bytes) // self._expert_bytes)
            missed = 1 - slots / self._experts
            streamed += int(self._moe_layers * self._active_here * self._expert_bytes * missed)
        pinned = frozenset(
            block
            for kind, count in zip(self._kinds, counts, strict=True)
            for block, _ in self._pinned(kind, count, counts[self._lead])
        )
        return Pinning(pinned | self._kept.keys(), window, slots, streamed)

    def _pinned(self, kind: _Kind, count: int, leads: int) -> Sequence[tuple[BlockId, int]]:
        """`count` blocks of a kind, as far apart as they can be. `leads` blocks of the largest kind in layers are
        pinned. If they are enough, these are pinned in the same layers, so that no two blocks of the largest kind and
        this one that stream become neighbours."""
        if kind.of_layers and count <= leads:
            layers = {block.layer for block, _ in _evenly(self._kinds[self._lead].blocks, leads)}
            beside = [item for item in kind.blocks if item[0].layer in layers]
            if len(beside) >= count:
                return _evenly(beside, count)
        return _evenly(kind.blocks, count)

    def _windows(self, counts: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of the largest block that streams, and of the two largest neighbours: a window that holds both lets the
        disk read one while the other is computed."""
        each = zip(self._kinds, counts, strict=True)
        streamed = [(kind, count) for kind, count in each if count < len(kind.blocks)]
        if not streamed:
            return 0, 0
        (first, pinned), *others = streamed
        apart = pinned == len(first.blocks) - 1  # there is only one
        if first is self._kinds[self._lead]:
            apart |= any(kind.of_layers and count <= pinned for kind, count in others)
        second = others[0][0] if apart and others else first
        return first.largest_bytes, first.largest_bytes + second.largest_bytes


class _Kind:
    """Blocks of one kind with their bytes, in their order."""

    def __init__(self, blocks: Sequence[tuple[BlockId, int]]) -> None:
        self.blocks = blocks
        self.of_layers = blocks[0][0].kind != "head"
        self.largest_bytes = max(nbytes for _, nbytes in blocks)
        self.alike = all(nbytes == self.largest_bytes for _, nbytes in blocks)


class _Candidate(NamedTuple):
    """How many blocks of each kind are pinned, and the bytes that follow from it."""

    counts: tuple[int, ...]
    streamed_bytes: int
    largest_bytes: int  # of a block that streams
    neighbours_bytes: int  # of the two largest together

    def window_bytes(self, share_bytes: int) -> int:
        return min(between(self.largest_bytes, share_bytes, self.neighbours_bytes), self.streamed_bytes)


_streamed_bytes = attrgetter("streamed_bytes")


def _counts(kinds: Sequence[_Kind]) -> Iterator[tuple[int, ...]]:
    """How many blocks of each kind may be pinned. Any number of the first kind, and of the others one kind after the
    other; and if all of the first kind are pinned, some of one kind and at most as many of the next."""
    first, *others = (len(kind.blocks) for kind in kinds)
    for count in range(first + 1):
        for of_others in range(sum(others) + 1):
            yield count, *_poured(of_others, others)
    for place, (whole, following) in enumerate(pairwise(others)):
        for count in range(1, whole):
            for beside in range(1, min(count, following) + 1):
                yield first, *others[:place], count, beside, *(0 for _ in others[place + 2 :])


def _poured(count: int, sizes: Sequence[int]) -> Iterator[int]:
    """`count` blocks dealt to kinds of these sizes, each filled before the next."""
    for size in sizes:
        yield min(count, size)
        count -= min(count, size)


def _evenly(items: Sequence[tuple[BlockId, int]], count: int) -> Sequence[tuple[BlockId, int]]:
    """`count` of the items, as far apart as they can be (Bresenham's line)."""
    whole = len(items)
    return [item for place, item in enumerate(items) if (place + 1) * count // whole > place * count // whole]


def between(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))
