"""Plans of one machine with a device that has memory of its own: which blocks go there.

Every token reads all dense weights, so what counts is how many bytes lie in the faster memory. Layers go there from the
last one on, and the head before them: rows of the embedding are gathered on the host, so hidden states pass the link
once, and logits come back. Of a mixture a token reads few experts, so the rest of all layers goes first, and then, from
the last layer on, experts. The CPU computes the others, for which hidden states go out and come back; or, for many
tokens, they come, through what whole layers leave of the device's memory. So do other layers of a dense model, for
which the last ones make room.

What this machine's memory has no room for comes from its disk to the CPU, which computes it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from .hardware_guesses import KV_SHARE, SCRATCH_SHARE
from .memory_layout import (
    LOADING_BYTES,
    LOOKED_PAGES,
    LOOKED_TOGETHER,
    PAGE_TOKENS,
    SCORES_TOGETHER,
    arena_slack,
    kv_page_bytes,
    staged_slot_bytes,
)
from .pinning import Pinnings
from .plan import (
    BlockPlan,
    Misfit,
    Plan,
    Wanted,
    first_fit,
    kv_plan,
    least_kv_pages,
    plan_of,
    scratch_bytes,
    step_numbers,
)
from .spec import BlockId, ModelSpec
from .streamed_plan import least_memory, streamed_within
from .throughput.profile import Accelerator

OPERANDS_BYTES = 1 << 20  # of a step besides hidden states: pages, positions, ids, routes
LAYERS_KEPT = 0.9  # of those that would be there with the shortest context
STAGED_EXPERTS = 4  # at most, that come together
STAGED_BYTES = 64 << 20  # of those, if more than one
FEW_ROWS, MANY_ROWS = 64, 512  # with which an expert is tried: reading it decides, or arithmetic
_ENDLESS_BYTES = _ENDLESS_TOKENS = 1 << 62
PINNED_BYTES = 6 << 20  # of memory that is page-locked, through which a device's copies go


class ExpertTimes(NamedTuple):
    """What one expert, or a dense model's feed-forward, of so many bytes takes a device: seconds to come from this
    machine's memory, and to be computed for so many rows; for so many that arithmetic decides (0: not tried).
    `locked_s`: to come from where it is page-locked (0: not tried, or nothing is)."""

    nbytes: int
    come_s: float
    rows: int
    computed_s: float
    many_rows: int = 0
    many_s: float = 0.0
    locked_s: float = 0.0


class DeviceRoom(NamedTuple):
    """Memory of a device: what is free of it, what its kernels need for themselves, whether their attention copies K
    and V of a text and has all scores of a part of it, and all of it. `expert`: what one of a mixture takes there, if
    that was tried. `laws`: how fast it is, where that is known; `optional`: they are, and nobody insists on it, as the
    processor alone may be faster."""

    name: str
    free_bytes: int
    kernel_bytes: int
    gathers: bool
    limit_bytes: int
    expert: ExpertTimes | None = None
    laws: Accelerator | None = None
    optional: bool = False


class ModelBytes(NamedTuple):
    """Bytes of a model's blocks in the order of a step, of the one matrix that a tied embedding and head share (0 if
    they are not tied), of all vectors where they are counted with the first block (else 0), and of all of them."""

    blocks: Mapping[BlockId, int]
    tied: int
    vectors: int
    all_vectors: int = 0


class NoRoomThere(NamedTuple):
    """Not even one layer, without its experts, fits on the device; with `least_bytes` of it, one would."""

    least_bytes: int


def plan_on_device(
    contexts: Sequence[Wanted],
    model: ModelBytes,
    room: DeviceRoom,
    *,
    memory_bytes: int,
    staged_tokens: int = 0,
) -> Plan | Misfit | NoRoomThere:
    """As much of the model as fits on the device, the rest in `memory_bytes` of this machine's memory.

    contexts: what is asked for, once with each context that would do, the longest first. K and V take the place of
    layers, so the longest is taken that leaves most of the layers there that the shortest would. `staged_tokens`: of a
    step, from which on experts of the CPU, or dense layers, should come to the device; 0 = they never should.
    """
    made = longest([_plan(wanted, model, room, memory_bytes, staged_tokens) for wanted in contexts])
    if staged_tokens and not contexts[0].spec.moe and not (isinstance(made, Plan) and made.staged_tokens):
        # It was chosen beside plans with fewer layers there, as these make room for others.
        return plan_on_device(contexts, model, room, memory_bytes=memory_bytes)
    return made


def device_scratch_bytes(wanted: Wanted, room: DeviceRoom) -> int:
    """What a step holds on the device besides weights and KV, at most."""
    spec = wanted.spec
    rows = wanted.chunk_tokens + wanted.sequences + wanted.guesses
    numbers = step_numbers(wanted._replace(native=True)) + rows * spec.head_dim * len(spec.ropes)
    if spec.moe:  # what goes to experts of the CPU: scores, and these together with a block's input
        numbers += rows * (spec.hidden + 2 * spec.moe.experts)
    if room.gathers:
        # K and V, and V before it lies in order or K with its scale; scores, with their softmax and where it is NaN;
        # and what a position sees, as numbers and as bytes, for all heads that share K and V.
        context, kv_heads = wanted.context_tokens, spec.kv_heads
        of_row = context * spec.heads
        scores = min(min(rows, wanted.chunk_tokens) * of_row, max(SCORES_TOGETHER, of_row))
        numbers += 3 * context * kv_heads * spec.head_dim + 5 * scores // 2 + 5 * scores // (4 * kv_heads)
        # Of answers their queries, and what is found in each part of what they look at.
        of_text = -(-context // (LOOKED_PAGES * PAGE_TOKENS)) * spec.heads * (spec.head_dim + 2)
        numbers += wanted.sequences * spec.heads * spec.head_dim
        numbers += min(wanted.sequences * of_text, max(LOOKED_TOGETHER, of_text))
    return 4 * numbers + OPERANDS_BYTES + room.kernel_bytes


def _plan(
    wanted: Wanted, model: ModelBytes, room: DeviceRoom, memory_bytes: int, staged_tokens: int
) -> Plan | Misfit | NoRoomThere:
    spec, scratch = wanted.spec, device_scratch_bytes(wanted, room)
    pages = least_kv_pages(wanted)
    page_bytes = kv_page_bytes(spec, wanted.kv_type) // len(spec.layers)
    dense, experts = zip(*(_blocks(spec, layer) for layer in range(len(spec.layers))), strict=True)
    layers = [sum(map(model.blocks.__getitem__, its)) for its in dense]
    sizes = [nbytes + pages * page_bytes for nbytes in layers]
    free = room.free_bytes - scratch - model.vectors
    come = staged_tokens > 0 and not spec.moe and _fitting(sizes, free) < len(sizes)
    if come:
        scratch += model.all_vectors - model.vectors  # those of layers that come stay
        rooms = (max(map(model.blocks.__getitem__, its)) for its in zip(*dense, strict=True))
        free = room.free_bytes - scratch - model.vectors - 2 * sum(map(staged_slot_bytes, rooms))
    heads = _heads(model)
    head_bytes = _head_bytes(model, spec)
    last = len(layers)
    alone, beside = _fitting(sizes, free), _fitting(sizes, free - head_bytes) if heads else 0
    takes_head = beside > 0 and sum(layers[last - beside :]) + head_bytes >= sum(layers[last - alone :])
    count = beside if takes_head else alone
    if not count and come:
        return _plan(wanted, model, room, memory_bytes, 0)
    if not count:
        return NoRoomThere(scratch + model.vectors + sizes[-1])
    first = last - count
    there = {block for its in dense[first:] for block in its}
    left = free - sum(sizes[first:]) - (head_bytes if takes_head else 0)
    mixtures = [sum(map(model.blocks.__getitem__, its)) for its in experts]
    whole = 0 if first else _fitting(mixtures, left)
    slot = staged_slot_bytes(max((model.blocks[block] for its in experts for block in its), default=0))
    staged = 0
    if staged_tokens and any(mixtures[first : last - whole]):
        if whole and left - sum(mixtures[last - whole :]) < 2 * slot:
            whole -= 1
        left -= sum(mixtures[last - whole :])
        staged = min(STAGED_EXPERTS, max(1, STAGED_BYTES // slot), left // (2 * slot))
    there |= {block for its in experts[last - whole :] for block in its}
    blocks = dict(model.blocks)
    if takes_head:
        there |= heads.keys()
        blocks = with_head_there(model, spec)
    plans = [
        BlockPlan(block, nbytes, "gpu", room.name) if block in there else BlockPlan(block, nbytes)
        for block, nbytes in blocks.items()
    ]
    least = replace(
        plan_of(wanted, plans, pages, host_scratch(wanted, plans)),
        device_scratch_bytes=scratch + model.vectors,
        staged_tokens=staged_tokens if staged or (come and first) else 0,
        staged_experts=staged,
    )
    if least.peak_bytes > memory_bytes:
        if least.staged_tokens:  # then what made room for others to come may be what is too much here
            return _plan(wanted, model, room, memory_bytes, 0)
        return Misfit(least.peak_bytes, least)
    if wanted.kv_tokens is not None:
        return least
    more = (room.free_bytes - least.device_bytes) // (count * page_bytes)
    if first:
        half = (memory_bytes - least.peak_bytes + pages * first * page_bytes) // 2  # as `plan_in_ram`
        more = min(more, max(0, half // (first * page_bytes) - pages))
    return replace(least, kv=kv_plan(wanted, min(pages * wanted.sequences, pages + more)))


def plan_beside_disk(
    contexts: Sequence[Wanted], model: ModelBytes, room: DeviceRoom, *, memory_bytes: int
) -> Plan | Misfit | NoRoomThere:
    """As `plan_on_device`; what of the rest has no room in `memory_bytes` comes from disk to the CPU: layers through a
    window, experts into slots. model: as it is in a pack, the head in slices, an embedding that is tied to it without
    bytes."""
    return with_longer_steps(
        contexts, room, memory_bytes, lambda wanted: _beside_disk(wanted, model, room, memory_bytes)
    )


def with_longer_steps(
    contexts: Sequence[Wanted],
    room: DeviceRoom,
    memory_bytes: int,
    made: Callable[[Wanted], Plan | Misfit | NoRoomThere],
) -> Plan | Misfit | NoRoomThere:
    """The longest context with long steps, or else with such as are wanted."""
    longer = longest([made(longer_steps(wanted, room, memory_bytes)) for wanted in contexts])
    return longer if isinstance(longer, Plan) else longest([made(wanted) for wanted in contexts])


def longer_steps(
    wanted: Wanted, room: DeviceRoom, memory_bytes: int, most_tokens: int = _ENDLESS_TOKENS
) -> Wanted:
    """With as much of prompts in one step, up to `most_tokens`, as a share of both memories allows: what comes for it
    comes once for all of it."""
    most = max(wanted.chunk_tokens, min(most_tokens, wanted.context_tokens * wanted.sequences))
    longest = wanted
    while longest.chunk_tokens < most:
        tried = longest._replace(chunk_tokens=min(2 * longest.chunk_tokens, most))
        here, there = scratch_bytes(tried), device_scratch_bytes(tried, room)
        if SCRATCH_SHARE * here > memory_bytes or SCRATCH_SHARE * there > room.free_bytes:
            break
        longest = tried
    return longest


def _beside_disk(
    wanted: Wanted, model: ModelBytes, room: DeviceRoom, memory_bytes: int
) -> Plan | Misfit | NoRoomThere:
    there = _plan(wanted, model, room, _ENDLESS_BYTES, 0)
    if not isinstance(there, Plan):
        return there
    rest = {it.block: it.nbytes for it in there.blocks if it.tier == "ram"}
    pinnings = Pinnings(wanted.spec, rest)

    def made(memory_bytes: int) -> Plan | None:
        pages, (mine, whole) = there.kv.pages, there.device_layers
        if mine < whole and wanted.kv_tokens is None:
            here_bytes = kv_page_bytes(wanted.spec, wanted.kv_type) * (whole - mine) // whole
            pages = max(least_kv_pages(wanted), min(pages, memory_bytes // KV_SHARE // here_bytes))
        placed = replace(there, kv=kv_plan(wanted, pages))
        here = streamed_within(
            wanted._replace(kv_tokens=pages * PAGE_TOKENS),
            rest,
            model.vectors,
            memory_bytes=memory_bytes + placed.device_kv_bytes,  # which it takes to be here
            pinnings=pinnings,
        )
        if here is None:
            return None
        tiers = {it.block: it for it in here.blocks}
        blocks = tuple(tiers.get(it.block, it) for it in there.blocks)
        plan = replace(here, blocks=blocks, device_scratch_bytes=there.device_scratch_bytes)
        plan = room_for_loading(plan)
        return plan if plan.peak_bytes <= memory_bytes else None

    return made(memory_bytes) or least_memory(made, memory_bytes)


def room_for_loading(plan: Plan) -> Plan:
    """The same plan, with at least as much of this machine's memory as blocks take on their way to the device: from a
    pack they come there before there is anything else."""
    lacks = max(0, loading_bytes(plan.blocks) - plan.peak_bytes)
    return replace(plan, scratch_bytes=plan.scratch_bytes + lacks)


def longest(tried: Sequence[Plan | Misfit | NoRoomThere]) -> Plan | Misfit | NoRoomThere:
    """With the longest context that leaves most layers on the device, or that fits."""
    if plans := [made for made in tried if isinstance(made, Plan)]:
        most = max(map(_layers_there, plans))
        return next(plan for plan in plans if _layers_there(plan) >= LAYERS_KEPT * most)
    found = [made for made in tried if isinstance(made, Misfit)]
    return first_fit(found) if found else min(made for made in tried if isinstance(made, NoRoomThere))


def _heads(model: ModelBytes) -> dict[BlockId, int]:
    return {block: nbytes for block, nbytes in model.blocks.items() if block.kind == "head"}


def _head_bytes(model: ModelBytes, spec: ModelSpec) -> int:
    """Of a head on a device."""
    heads = _heads(model)
    return max(sum(heads.values()), model.tied + 4 * spec.hidden if heads else 0)


def with_head_there(model: ModelBytes, spec: ModelSpec) -> dict[BlockId, int]:
    """Bytes of all blocks with the head on a device: if it is tied, there are two of it then."""
    blocks, heads = dict(model.blocks), _heads(model)
    if model.tied and heads:
        embed, head_bytes = BlockId("embed"), _head_bytes(model, spec)
        blocks[embed] = max(blocks[embed], model.tied)
        blocks |= {block: max(nbytes, -(-head_bytes // len(heads))) for block, nbytes in heads.items()}
    return blocks


def host_scratch(wanted: Wanted, blocks: Sequence[BlockPlan]) -> int:
    """What this machine's memory holds besides weights that stay there, and K and V: of a step, or while loading."""
    held = sum(it.nbytes for it in blocks if it.tier == "ram")
    return max(scratch_bytes(wanted), loading_bytes(blocks)) + arena_slack(held)


def loading_bytes(blocks: Sequence[BlockPlan]) -> int:
    """Of this machine's memory, for blocks on their way to the device."""
    return LOADING_BYTES + 2 * max((it.nbytes for it in blocks if it.tier == "gpu"), default=0)


def _blocks(spec: ModelSpec, layer: int) -> tuple[tuple[BlockId, ...], tuple[BlockId, ...]]:
    """(what every token reads of a layer, its experts)."""
    ffn, *experts = spec.ffn_blocks(layer)
    return (BlockId("attn", layer), ffn), tuple(experts)


def _layers_there(plan: Plan) -> float:
    """On the device; the experts of a layer count as one more."""
    layers, (experts, among) = plan.device_layers[0], plan.device_experts
    return layers + experts * plan.device_layers[1] / among if among else layers


def _fitting(sizes: Sequence[int], free: int) -> int:
    """How many fit, from the last one on."""
    count = 0
    for nbytes in reversed(sizes):
        if (free := free - nbytes) < 0:
            break
        count += 1
    return count
