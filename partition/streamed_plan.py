"""Plans for models that do not fit into memory: what KV gets, how long a step may be, and what is left for weights.

A plan for more memory never streams more bytes, because what it holds besides weights grows by less than memory does.
Pure: knows sizes. `pinning` decides which weights stay; `offload.window` knows how a window works, `offload.pack` what
a pack is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from .hardware_guesses import KV_SHARE, SCRATCH_SHARE, WINDOW_SHARE
from .memory_layout import PAGE_TOKENS, kv_page_bytes
from .pinning import Pinnings, between
from .plan import BlockPlan, Misfit, Plan, Wanted, least_kv_pages, plan_of, scratch_bytes
from .spec import BlockId

PART_TOKENS = (32, 64, 256)  # rows in a block together: at least; before steps get longer instead; at most
READING_BYTES = 12 << 20  # that reading itself holds: rows of the embedding, ends of huge pages
EXPERTS_TOGETHER = 4  # of those on disk that are computed in one go: meanwhile the next ones are read
_SEARCH_BYTES = 1 << 20  # the least memory is found in steps of this many bytes


def plan_streamed(
    wanted: Wanted,
    extents: Mapping[BlockId, int],
    vectors_bytes: int,
    *,
    memory_bytes: int,
    window_times: float = 1.0,
    pinnings: Pinnings | None = None,
) -> Plan | Misfit:
    """A plan that streams what does not fit into `memory_bytes`.

    extents: bytes of every block in a pack, in the order of a step, the head in slices; 0 for an embedding that is tied
    to the head. vectors_bytes: those of norms and biases, which stay in memory. window_times: of the share of memory
    that the window usually gets. pinnings: of these extents, if they are known already.
    """
    pinnings = pinnings or Pinnings(wanted.spec, extents)
    plan = partial(_plan, wanted, pinnings, extents, vectors_bytes, window_times / WINDOW_SHARE, True)
    return plan(memory_bytes) or least_memory(plan, memory_bytes)


def streamed_within(
    wanted: Wanted,
    extents: Mapping[BlockId, int],
    vectors_bytes: int,
    *,
    memory_bytes: int,
    pinnings: Pinnings,
) -> Plan | None:
    """The same with steps no longer than is wanted, or None if not even the least fits."""
    return _plan(wanted, pinnings, extents, vectors_bytes, 1 / WINDOW_SHARE, False, memory_bytes)


def experts_together(slots: int) -> int:
    """How many experts are computed in one go, if there are slots for so many and the others are on disk."""
    return max(1, min(EXPERTS_TOGETHER, slots // 2))


def kv_has_room(wanted: Wanted, memory_bytes: int) -> bool:
    """Whether a full context fits into the share of `memory_bytes` that KV gets, without taking from weights."""
    context_pages = -(-wanted.context_tokens // PAGE_TOKENS)
    return context_pages * kv_page_bytes(wanted.spec, wanted.kv_type) <= memory_bytes // KV_SHARE


def least_memory(plan: Callable[[int], Plan | None], memory_bytes: int) -> Misfit:
    """The least memory for which `plan` makes a plan. It makes none for `memory_bytes`."""
    enough = max(memory_bytes, _SEARCH_BYTES)
    while plan(enough) is None:
        enough *= 2
    steps = range(_SEARCH_BYTES, enough + _SEARCH_BYTES, _SEARCH_BYTES)
    least_bytes = steps[bisect_left(steps, True, key=lambda memory: plan(memory) is not None)]
    made = plan(least_bytes)
    assert made is not None
    return Misfit(least_bytes, made)


def _plan(
    wanted: Wanted,
    pinnings: Pinnings,
    extents: Mapping[BlockId, int],
    vectors_bytes: int,
    window_share: float,
    longer: bool,
    memory_bytes: int,
) -> Plan | None:
    """None if not even the least fits."""
    fixed = _fixed(wanted, memory_bytes, longer=longer)
    always = vectors_bytes + READING_BYTES
    room = memory_bytes - always - fixed.kv_bytes - fixed.room_bytes
    pinning = pinnings.best(room, int(memory_bytes * window_share))
    if pinning is None:
        return None
    blocks = [
        BlockPlan(block, nbytes, "ram" if block in pinning.pinned else "disk")
        for block, nbytes in extents.items()
    ]
    wanted = wanted._replace(chunk_tokens=fixed.chunk_tokens)
    return replace(
        plan_of(wanted, blocks, fixed.kv_pages, always + fixed.scratch_bytes),
        part_tokens=fixed.part_tokens,
        window_bytes=pinning.window_bytes,
        expert_slots=pinning.expert_slots,
        streamed_bytes=pinning.streamed_bytes,
    )


class _Fixed(NamedTuple):
    """What a plan holds besides weights. `kv_bytes` and `room_bytes` are set aside for KV and scratch: they grow evenly
    with memory, while whole pages and tokens grow in jumps."""

    kv_pages: int
    kv_bytes: int
    chunk_tokens: int
    part_tokens: int
    scratch_bytes: int
    room_bytes: int


def _fixed(wanted: Wanted, memory_bytes: int, *, longer: bool) -> _Fixed:
    """As much of a prompt in one step as its share of memory allows; then as many of its rows in a block together."""
    page_bytes = kv_page_bytes(wanted.spec, wanted.kv_type)
    kv_bytes = least_kv_pages(wanted) * page_bytes
    if wanted.kv_tokens is None:
        kv_bytes = between(kv_bytes, memory_bytes // KV_SHARE, kv_bytes * wanted.sequences)
    pages = kv_bytes // page_bytes

    def scratch(chunk: int, part: int) -> int:
        return scratch_bytes(wanted._replace(chunk_tokens=chunk), part)

    least_part, first_part, most_part = PART_TOKENS
    shortest = longest = wanted.chunk_tokens
    if longer:
        longest = max(longest, pages * PAGE_TOKENS)
    share = memory_bytes // SCRATCH_SHARE
    room = between(scratch(shortest, least_part), share, scratch(longest, most_part))
    part = first_part if scratch(shortest, first_part) <= room else least_part
    chunk = _most(shortest, longest, lambda tokens: scratch(tokens, part) <= room)
    part = _most(part, most_part, lambda tokens: scratch(chunk, tokens) <= room)
    return _Fixed(pages, kv_bytes, chunk, part, scratch(chunk, part), room)


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number of [low, high] that fits. `low` does, and no number fits that is larger than one that does
    not."""
    return low + bisect_left(range(low + 1, high + 1), True, key=lambda number: not fits(number))
