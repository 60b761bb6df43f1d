"""Plans in which all layers pass through a device in every step, while the CPU attends to K and V in its own memory; or
the device for texts with many rows in a step.

Weights come from memory, or from disk through a window in memory. What stays on the device besides the head are, of a
mixture, experts; of a dense model feed-forward blocks. Pure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...memory_layout import PAGE_TOKENS, arena_slack, kv_page_bytes, lent_pages
from ...placement import (
    DeviceRoom,
    ModelBytes,
    NoRoomThere,
    device_scratch_bytes,
    host_scratch,
    room_for_loading,
    with_head_there,
    with_longer_steps,
)
from ...plan import (
    BlockPlan,
    Misfit,
    Plan,
    Wanted,
    first_fit,
    kv_plan,
    least_kv_pages,
    plan_of,
    scratch_bytes,
)
from ...spec import BlockId
from ...streamed_plan import READING_BYTES, least_memory

READ_AHEAD_BYTES = 32 << 20  # of a window to a device, if there is room: twice what readers have under way
# Blocks of the largest size that it holds: while one is copied, the next is there, and another one is read. With two a
# block often waits for the one before it, as it has to lie in one piece, and then the link waits for the disk.
AHEAD_BLOCKS = 3


def plan_passing(
    contexts: Sequence[Wanted],
    model: ModelBytes,
    room: DeviceRoom,
    *,
    memory_bytes: int,
    vectors_bytes: int,
    attending_rows: int = 0,
) -> Plan | Misfit | NoRoomThere:
    """All layers in `memory_bytes` of this machine's memory, K and V, too; their weights pass through the device in
    every step. Of experts as many stay there as there is room for, of every layer the same ones. contexts: as for
    `plan_on_device`; the longest that fits is taken. `vectors_bytes`: of all norms and biases, which stay.
    `attending_rows`: texts with so many rows in a step attend there (0: none)."""
    tried = [
        _passing(wanted, model, room, memory_bytes, vectors_bytes, attending_rows) for wanted in contexts
    ]
    found = [made for made in tried if not isinstance(made, NoRoomThere)]
    return first_fit(found) if found else min(made for made in tried if isinstance(made, NoRoomThere))


def _passing(
    wanted: Wanted,
    model: ModelBytes,
    room: DeviceRoom,
    memory_bytes: int,
    vectors_bytes: int,
    attending_rows: int,
) -> Plan | Misfit | NoRoomThere:
    spec = wanted.spec
    plan = _through(wanted, with_head_there(model, spec), room, vectors_bytes, attending_rows)
    if isinstance(plan, NoRoomThere):
        return plan
    if plan.peak_bytes > memory_bytes:
        return Misfit(plan.peak_bytes, plan)
    if wanted.kv_tokens is not None:
        return plan
    half = (memory_bytes - plan.peak_bytes + plan.kv.nbytes) // 2  # as `plan_in_ram`
    pages = min(plan.kv.pages * wanted.sequences, half // kv_page_bytes(spec, wanted.kv_type))
    return replace(plan, kv=kv_plan(wanted, max(plan.kv.pages, pages)))


def _through(
    wanted: Wanted,
    blocks: Mapping[BlockId, int],
    room: DeviceRoom,
    vectors_bytes: int,
    attending_rows: int,
) -> Plan | NoRoomThere:
    """All blocks but the embedding pass through the device, except the head and what else there is room for: experts of
    the same numbers in all layers; of a dense model the feed-forward blocks of some layers, as far apart as can be."""
    spec, scratch = wanted.spec, passing_scratch_bytes(wanted, room, attending_rows) + vectors_bytes
    layers = len(spec.layers)
    most = spec.moe.experts if spec.moe else layers

    def stays(block: BlockId, count: int) -> bool:
        if block.kind == "ffn" and not spec.moe:
            return (block.layer + 1) * count // layers > block.layer * count // layers
        return block.kind == "head" or (block.kind == "expert" and block.expert >= most - count)

    def made(count: int) -> Plan:
        """With so many of them on the device."""
        placed = [
            BlockPlan(block, nbytes)
            if block.kind == "embed"
            else BlockPlan(block, nbytes, "gpu" if stays(block, count) else "ram", room.name)
            for block, nbytes in blocks.items()
        ]
        here = host_scratch(wanted, placed) + _left_bytes(wanted, attending_rows)
        plan = plan_of(wanted, placed, least_kv_pages(wanted), here)
        return replace(plan, device_scratch_bytes=scratch, attending_rows=attending_rows)

    least = made(0)
    if least.device_bytes > room.free_bytes:
        return NoRoomThere(least.device_bytes)
    # Of a mixture some experts have to pass.
    counts = range(1, most if spec.moe else most + 1)
    return made(bisect_left(counts, True, key=lambda count: made(count).device_bytes > room.free_bytes))


def plan_passing_from_disk(
    contexts: Sequence[Wanted],
    model: ModelBytes,
    room: DeviceRoom,
    *,
    memory_bytes: int,
    kv_share: int,
    attending_rows: int = 0,
) -> Plan | Misfit | NoRoomThere:
    """As `plan_passing`; what has no room in `memory_bytes` passes through a window in it first. K and V get one
    `kv_share`-th of that. model: as for `plan_beside_disk`."""
    return with_longer_steps(
        contexts,
        room._replace(gathers=room.gathers and attending_rows > 0),
        memory_bytes,
        lambda wanted: _from_disk(wanted, model, room, memory_bytes, kv_share, attending_rows),
    )


def _from_disk(
    wanted: Wanted,
    model: ModelBytes,
    room: DeviceRoom,
    memory_bytes: int,
    kv_share: int,
    attending_rows: int,
) -> Plan | Misfit | NoRoomThere:
    through = _through(wanted, model.blocks, room, model.vectors, attending_rows)
    if isinstance(through, NoRoomThere):
        return through
    passing = [it for it in through.blocks if it.passes]
    largest = max(it.nbytes for it in passing)
    ahead = ahead_bytes(passing)
    beside = scratch_bytes(wanted) + READING_BYTES + model.vectors + _left_bytes(wanted, attending_rows)

    def made(memory_bytes: int) -> Plan | None:
        pages, page_bytes = through.kv.pages, kv_page_bytes(wanted.spec, wanted.kv_type)
        if wanted.kv_tokens is None:
            pages = max(pages, min(pages * wanted.sequences, memory_bytes // kv_share // page_bytes))
        scratch = beside + arena_slack(memory_bytes)
        room = memory_bytes - scratch - pages * page_bytes
        window = max(largest, min(ahead, room))  # first: without it, more that stays saves nothing
        pinned = spread(passing, room - window)
        blocks = tuple(
            it if it.tier == "gpu" or it.block in pinned else replace(it, tier="disk")
            for it in through.blocks
        )
        streamed = sum(it.nbytes for it in blocks if it.passes and it.tier == "disk")
        plan = replace(
            through,
            blocks=blocks,
            kv=kv_plan(wanted, pages),
            scratch_bytes=scratch,
            window_bytes=min(window, streamed),
            streamed_bytes=streamed,
        )
        plan = room_for_loading(plan)
        return plan if plan.peak_bytes <= memory_bytes else None

    return made(memory_bytes) or least_memory(made, memory_bytes)


def ahead_bytes(passing: Sequence[BlockPlan]) -> int:
    """Of a window that these pass through, if there is room."""
    sizes = sorted((it.nbytes for it in passing), reverse=True)
    return max(sum(sizes[:AHEAD_BLOCKS]), READ_AHEAD_BYTES)


def spread(blocks: Sequence[BlockPlan], room_bytes: int) -> frozenset[BlockId]:
    """Blocks that stay within so many bytes, as far apart as can be, so that others are read between them."""
    whole, held, seen, chosen = sum(it.nbytes for it in blocks), 0, 0, []
    for it in blocks:
        seen += it.nbytes
        if (held + it.nbytes) * whole <= room_bytes * seen:
            held += it.nbytes
            chosen.append(it.block)
    return frozenset(chosen)


def passing_scratch_bytes(wanted: Wanted, room: DeviceRoom, attending_rows: int) -> int:
    """What a step holds on the device besides weights, where those pass through it. Where it attends for no text,
    nothing is gathered for that."""
    spec, asking = wanted.spec, _asking_bytes(wanted)
    if not attending_rows:
        return device_scratch_bytes(wanted, room._replace(gathers=False)) + asking
    found = (
        4 * _rows(wanted) * spec.heads * spec.head_dim
    )  # before it is put together with what the CPU finds
    return device_scratch_bytes(wanted, room) + asking + found + 2 * _lent_bytes(wanted)  # of both groups


def _left_bytes(wanted: Wanted, attending_rows: int) -> int:
    """Pages of a group that have left the device and are not in the pool yet, at most: those that its rows fill, and of
    each of its texts one that was begun and one that is."""
    if not attending_rows:
        return 0
    texts = min(wanted.sequences, -(-wanted.chunk_tokens // attending_rows))
    pages = wanted.chunk_tokens // PAGE_TOKENS + 2 * texts
    return min(pages * _layers_page_bytes(wanted), _lent_bytes(wanted))


def _lent_bytes(wanted: Wanted) -> int:
    return lent_pages(wanted.context_tokens, wanted.chunk_tokens) * _layers_page_bytes(wanted)


def _layers_page_bytes(wanted: Wanted) -> int:
    return kv_page_bytes(wanted.spec, wanted.kv_type) // len(wanted.spec.layers)


def _asking_bytes(wanted: Wanted) -> int:
    """What is on its way between queries and what the CPU finds: q, k and v once more, put together, and the latter."""
    spec = wanted.spec
    return 4 * _rows(wanted) * (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim


def _rows(wanted: Wanted) -> int:
    """Of a step, at most."""
    return wanted.chunk_tokens + wanted.sequences + wanted.guesses
