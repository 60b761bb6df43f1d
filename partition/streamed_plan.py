"""Plans for models that do not fit into memory: what KV gets, how long a step may be, and what is left for weights.

More memory never streams more bytes: what grows with memory besides the weights grows by less than memory does.
Pure: knows sizes. Which weights stay is decided in `pinning`; how a window works is `offload.window`, what a pack is
`offload.pack`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from .guesses import KV_SHARE, SCRATCH_SHARE, WINDOW_SHARE
from .memory_layout import PAGE_TOKENS, kv_page_bytes
from .pinning import Pinnings, between
from .plan import (
    BlockPlan,
    Misfit,
    Plan,
    Wanted,
    kv_plan,
    least_kv_pages,
    scratch_bytes,
)
from .spec import BlockId

PART_TOKENS = (32, 64, 256)  # rows in a block together: least; enough to lengthen steps instead; most
READING_BYTES = 12 << 20  # what reading itself holds: rows of the embedding, ends of huge pages
_SEARCH_BYTES = 1 << 20  # how exactly the least memory is told


def plan_streamed(
    wanted: Wanted, extents: Mapping[BlockId, int], vectors_bytes: int, *, memory_bytes: int
) -> Plan | Misfit:
    """A plan that streams what does not fit into `memory_bytes`.

    extents: bytes of every block in a pack, in the order of a step, the head in slices; those of an embedding that is
    tied to the head are 0. vectors_bytes: norms and biases, which stay.
    """
    pinnings = Pinnings(wanted.spec, extents)

    def plan(memory: int) -> Plan | None:
        return _plan(wanted, pinnings, extents, vectors_bytes, memory)

    return plan(memory_bytes) or _least(plan, memory_bytes)


def kv_has_room(wanted: Wanted, memory_bytes: int) -> bool:
    """Whether a full context fits into what KV gets of `memory_bytes`, without taking from the weights."""
    context_pages = -(-wanted.context_tokens // PAGE_TOKENS)
    return context_pages * kv_page_bytes(wanted.spec, wanted.kv_type) <= memory_bytes // KV_SHARE


def _least(plan: Callable[[int], Plan | None], memory_bytes: int) -> Misfit:
    """The least memory that `plan` makes a plan for, more than `memory_bytes`, for which it makes none."""
    enough = max(memory_bytes, _SEARCH_BYTES)
    while plan(enough) is None:
        enough *= 2
    short = _most(0, enough // _SEARCH_BYTES, lambda steps: plan(steps * _SEARCH_BYTES) is None)
    least_bytes = (short + 1) * _SEARCH_BYTES
    made = plan(least_bytes)
    assert made is not None
    return Misfit(least_bytes, made)


def _plan(
    wanted: Wanted, pinnings: Pinnings, extents: Mapping[BlockId, int], vectors_bytes: int, memory_bytes: int
) -> Plan | None:
    """None when the least that it needs does not fit."""
    fixed = _fixed(wanted, memory_bytes)
    always = vectors_bytes + READING_BYTES
    room = memory_bytes - always - fixed.kv_bytes - fixed.room_bytes
    pinning = pinnings.best(room, memory_bytes // WINDOW_SHARE)
    if pinning is None:
        return None
    return Plan(
        blocks=tuple(
            BlockPlan(block, nbytes, "ram" if block in pinning.pinned else "disk")
            for block, nbytes in extents.items()
        ),
        kv=kv_plan(wanted, fixed.kv_pages),
        context_tokens=wanted.context_tokens,
        chunk_tokens=fixed.chunk_tokens,
        sequences=wanted.sequences,
        guesses=wanted.guesses,
        threads=wanted.threads,
        scratch_bytes=always + fixed.scratch_bytes,
        part_tokens=fixed.part_tokens,
        window_bytes=pinning.window_bytes,
        expert_slots=pinning.expert_slots,
        streamed_bytes=pinning.streamed_bytes,
    )


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
    kv_bytes = least_kv_pages(wanted) * page_bytes
    if wanted.kv_tokens is None:
        kv_bytes = between(kv_bytes, memory_bytes // KV_SHARE, kv_bytes * wanted.sequences)
    pages = kv_bytes // page_bytes

    def scratch(chunk: int, part: int) -> int:
        return scratch_bytes(wanted._replace(chunk_tokens=chunk), part)

    least_part, first_part, most_part = PART_TOKENS
    shortest, longest = wanted.chunk_tokens, max(wanted.chunk_tokens, pages * PAGE_TOKENS)
    share = memory_bytes // SCRATCH_SHARE
    room = between(scratch(shortest, least_part), share, scratch(longest, most_part))
    part = first_part if scratch(shortest, first_part) <= room else least_part
    chunk = _most(shortest, longest, lambda tokens: scratch(tokens, part) <= room)
    part = _most(part, most_part, lambda tokens: scratch(chunk, tokens) <= room)
    return _Fixed(pages, kv_bytes, chunk, part, scratch(chunk, part), room)


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number of [low, high] that fits, if those that do come first; `low` does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
