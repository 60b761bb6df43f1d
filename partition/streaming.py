"""Plans for models that do not fit into memory: what stays, what passes through the window, how long a step may be.

Every token needs every dense block, in the same order, so which of them stay makes no difference to the bytes that are
read: as many stay as fit, spread evenly, so that what is read passes while pinned neighbours compute. Of the blocks the
largest kind is pinned first, because the window must hold the largest that streams. Rows of an embedding are
gathered, so it need not stay. Experts are asked for in no order: they get equal slots after everything else has its
place.

More memory never streams more bytes: what grows with memory besides the weights grows by less than memory does.
Pure: knows sizes. How a window works is `offload.window`, what a pack is `offload.pack`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from .errors import PlanError
from .memory_layout import PAGE_TOKENS, kv_page_bytes
from .plan import BlockPlan, KvPlan, Plan, Wanted, scratch_bytes
from .spec import BlockId, ModelSpec

KV_SHARE = 8  # of memory goes to the KV pool: an eighth, but one context at least
SCRATCH_SHARE = 12  # goes to long steps: a twelfth
WINDOW_SHARE = 4  # goes to the window: a quarter, but from the largest block to the two largest neighbours
PART_TOKENS = (32, 64, 256)  # rows in a block together: least; enough to lengthen steps instead; most
READING_BYTES = 12 << 20  # what reading itself holds: rows of the embedding, ends of huge pages
_SEARCH_BYTES = 1 << 20  # how exactly the least memory is told


def plan_within(
    wanted: Wanted, extents: Mapping[BlockId, int], vectors_bytes: int, *, memory_bytes: int
) -> Plan:
    """A plan that streams what does not fit into `memory_bytes`.

    extents: bytes of every block in a pack, in the order of a step, the head in slices; those of an embedding that is
    tied to the head are 0. vectors_bytes: norms and biases, which stay. Raises PlanError with the bytes that would do.
    """

    weights = _Weights(wanted.spec, extents)

    def plan(memory: int) -> Plan | None:
        return _plan(wanted, weights, vectors_bytes, memory)

    made = plan(memory_bytes)
    if made is None:
        enough = max(memory_bytes, _SEARCH_BYTES)
        while plan(enough) is None:
            enough *= 2
        short = _most(0, enough // _SEARCH_BYTES, lambda steps: plan(steps * _SEARCH_BYTES) is None)
        least = (short + 1) * _SEARCH_BYTES
        raise PlanError(
            f"needs {least / 1e6:,.0f} MB at least, even with its weights streamed from disk, "
            f"but the budget leaves {memory_bytes / 1e6:,.0f} MB",
            least,
        )
    return made


def _plan(wanted: Wanted, weights: _Weights, vectors_bytes: int, memory_bytes: int) -> Plan | None:
    """None when the least that it needs does not fit."""
    fixed = _fixed(wanted, memory_bytes)
    always = vectors_bytes + READING_BYTES
    room = memory_bytes - always - fixed.kv_bytes - fixed.room_bytes
    choice = weights.choose(room, memory_bytes // WINDOW_SHARE)
    if choice is None:
        return None
    page_bytes = kv_page_bytes(wanted.spec, wanted.kv_type)
    return Plan(
        blocks=tuple(
            BlockPlan(block, nbytes, "ram" if block in choice.pinned else "disk")
            for block, nbytes in weights.extents.items()
        ),
        kv=KvPlan(fixed.kv_pages, PAGE_TOKENS, wanted.kv_type, fixed.kv_pages * page_bytes),
        context_tokens=wanted.context_tokens,
        chunk_tokens=fixed.chunk_tokens,
        sequences=wanted.sequences,
        guesses=wanted.guesses,
        threads=wanted.threads,
        scratch_bytes=always + fixed.scratch_bytes,
        part_tokens=fixed.part_tokens,
        window_bytes=choice.window_bytes,
        expert_slots=choice.expert_slots,
        streamed_bytes=choice.streamed_bytes,
    )


# --- KV and scratch ---------------------------------------------------------------------------------------


class _Fixed(NamedTuple):
    """What a plan holds besides weights. `kv_bytes` and `room_bytes` are set aside for KV and scratch: they grow
    with memory without a jump, where pages and tokens come whole."""

    kv_pages: int
    kv_bytes: int
    chunk_tokens: int
    part_tokens: int
    scratch_bytes: int
    room_bytes: int


def _fixed(wanted: Wanted, memory_bytes: int) -> _Fixed:
    """Whole prompts in one step, as far as their share of memory allows; then more of them in a block at once."""
    page_bytes = kv_page_bytes(wanted.spec, wanted.kv_type)
    if wanted.kv_tokens is not None:
        kv_bytes = -(-wanted.kv_tokens // PAGE_TOKENS) * page_bytes
    else:
        one = -(-wanted.context_tokens // PAGE_TOKENS) * page_bytes
        kv_bytes = _between(one, memory_bytes // KV_SHARE, one * wanted.sequences)
    pages = kv_bytes // page_bytes

    def scratch(chunk: int, part: int) -> int:
        return scratch_bytes(wanted._replace(chunk_tokens=chunk), part)

    least_part, first_part, most_part = PART_TOKENS
    shortest, longest = wanted.chunk_tokens, max(wanted.chunk_tokens, pages * PAGE_TOKENS)
    share = memory_bytes // SCRATCH_SHARE
    room = _between(scratch(shortest, least_part), share, scratch(longest, most_part))
    part = first_part if scratch(shortest, first_part) <= room else least_part
    chunk = _most(shortest, longest, lambda tokens: scratch(tokens, part) <= room)
    part = _most(part, most_part, lambda tokens: scratch(chunk, tokens) <= room)
    return _Fixed(pages, kv_bytes, chunk, part, scratch(chunk, part), room)


# --- weights ----------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    pinned: frozenset[BlockId]
    window_bytes: int
    expert_slots: int
    streamed_bytes: int


_Result = TypeVar("_Result")


class _State(NamedTuple):
    """How many blocks of each kind are pinned, and what follows from it."""

    counts: tuple[int, ...]
    pinned_bytes: int
    window_bytes: tuple[int, int]  # with room for the largest block, and for the two largest neighbours


class _Kind:
    """Blocks of one kind with their bytes, in their order."""

    def __init__(self, blocks: Sequence[tuple[BlockId, int]]) -> None:
        self.blocks = blocks
        self.of_layers = blocks[0][0].kind != "head"
        self.largest = max(nbytes for _, nbytes in blocks)


def _evenly(items: Sequence[tuple[BlockId, int]], count: int) -> list[tuple[BlockId, int]]:
    """`count` of the items, as far apart as they can be (Bresenham's line)."""
    whole = len(items)
    return [item for place, item in enumerate(items) if (place + 1) * count // whole > place * count // whole]


class _Weights:
    """The blocks of a model that may stay or stream."""

    def __init__(self, spec: ModelSpec, extents: Mapping[BlockId, int]) -> None:
        self.extents = extents
        kinds: dict[str, list[tuple[BlockId, int]]] = {}
        for block, nbytes in extents.items():
            if block.kind not in ("embed", "expert"):
                kinds.setdefault(block.kind, []).append((block, nbytes))
        self._kinds = sorted(map(_Kind, kinds.values()), key=lambda kind: -kind.largest)
        self._base = next(place for place, kind in enumerate(self._kinds) if kind.of_layers)
        self._dense_bytes = sum(nbytes for kind in self._kinds for _, nbytes in kind.blocks)
        experts = [nbytes for block, nbytes in extents.items() if block.kind == "expert"]
        self._experts, self._expert_bytes = len(experts), max(experts, default=0)
        self._active = spec.moe.active if spec.moe else 0
        self._moe_layers = sum(layer.moe for layer in spec.layers)
        self._sums: dict[tuple[_Kind, int, int], int] = {}
        self._states = [
            _State(counts, sum(self._each(counts, self._bytes)), self._windows(counts))
            for counts in self._counts()
        ]

    def choose(self, room: int, window_share: int) -> _Choice | None:
        """What streams least within `room`; None when nothing does."""
        slots = min(self._active, self._experts)
        best: tuple[int, int, _State] | None = None
        for state in self._states:
            streamed = self._dense_bytes - state.pinned_bytes
            window = min(_between(state.window_bytes[0], window_share, state.window_bytes[1]), streamed)
            if state.pinned_bytes + window + slots * self._expert_bytes <= room:
                found = (streamed, window, state)
                best = min(best or found, found)
        if best is None:
            return None
        streamed, window, state = best
        if self._experts:
            if not streamed:
                slots = min(self._experts, (room - state.pinned_bytes) // self._expert_bytes)
            missed = 1 - slots / self._experts
            streamed += int(self._moe_layers * self._active * self._expert_bytes * missed)
        pinned = frozenset(block for items in self._each(state.counts, self._pinned) for block, _ in items)
        return _Choice(pinned, window, slots, streamed)

    def _counts(self) -> Iterator[tuple[int, ...]]:
        """How many of each kind may be pinned: any number of the first; of the others one kind after the other, and
        when all of the first are, also as many of the next kind at most."""
        first, *others = (len(kind.blocks) for kind in self._kinds)
        one, two = [(0,) * len(others)], []
        for place, whole in enumerate(others):
            before, after = others[:place], (0,) * (len(others) - place - 1)
            one += [(*before, count, *after) for count in range(1, whole + 1)]
            for count in range(1, whole if after else 0):
                most = min(count, others[place + 1])
                two += [(*before, count, beside, *after[1:]) for beside in range(1, most + 1)]
        for count in range(first + 1):
            yield from ((count, *counts) for counts in one)
        yield from ((first, *counts) for counts in two)

    def _each(self, counts: tuple[int, ...], what: Callable[[_Kind, int, int], _Result]) -> Iterator[_Result]:
        """`what` of each kind, so many of its blocks, and so many of the largest kind of layers' blocks."""
        base = counts[self._base]
        return (what(kind, count, base) for kind, count in zip(self._kinds, counts, strict=True))

    def _pinned(self, kind: _Kind, count: int, base: int) -> list[tuple[BlockId, int]]:
        """As far apart as they can be; if that is enough, in the layers of larger ones that are pinned: of those that
        stream no two become neighbours then."""
        if kind.of_layers and count <= base:
            layers = {block.layer for block, _ in _evenly(self._kinds[self._base].blocks, base)}
            beside = [item for item in kind.blocks if item[0].layer in layers]
            if len(beside) >= count:
                return _evenly(beside, count)
        return _evenly(kind.blocks, count)

    def _bytes(self, kind: _Kind, count: int, base: int) -> int:
        key = (kind, count, base if kind.of_layers and count <= base else -1)
        if key not in self._sums:
            self._sums[key] = sum(nbytes for _, nbytes in self._pinned(kind, count, base))
        return self._sums[key]

    def _windows(self, counts: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of the largest block that streams, and of the two largest neighbours: with room for them the disk reads
        while one of them is computed."""
        chosen = zip(self._kinds, counts, strict=True)
        streamed = [(kind, count) for kind, count in chosen if count < len(kind.blocks)]
        if not streamed:
            return 0, 0
        (first, pinned), *others = streamed
        apart = pinned == len(first.blocks) - 1  # there is only one
        if first is self._kinds[self._base]:
            apart |= any(kind.of_layers and count <= pinned for kind, count in others)
        second = others[0][0] if apart and others else first
        return first.largest, first.largest + second.largest


def _between(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number of [low, high] that fits, if those that do come first; `low` does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
