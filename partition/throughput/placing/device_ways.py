"""How one machine could run a model with a device. Pure, and deterministic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from ...hardware_guesses import KV_SHARE
from ...placement import (
    DeviceRoom,
    ModelBytes,
    NoRoomThere,
    longer_steps,
    plan_beside_disk,
    plan_on_device,
)
from ...plan import Misfit, Plan, Wanted
from ..alone import Way
from ..profile import Device
from ..weights_of import Product, Weighed
from .attending_worth import attends_from
from .passing_plans import plan_passing, plan_passing_from_disk
from .rooms import accelerator
from .staging_worth import at_least_fast, coming_of, staged_from

PASSING_TOKENS = 8192  # of prompts in a step for which weights come to a device
_WHERE_PROMPTS_ATTEND = ", where prompts attend"
_KV_SHARES = (KV_SHARE, 2)  # of memory, for K and V where weights come from disk


def expert_of(model: Weighed) -> Sequence[Product]:
    """The matrices of one expert; none if it has none."""
    return next((kind.expert for kind in model.layer_kinds if kind.expert), ())


def coming_one(model: Weighed) -> Sequence[Product]:
    """The matrices of one of the blocks that come to a device for many tokens: of an expert, or of a feed-forward."""
    return next((its for kind in model.layer_kinds if (its := coming_of(model, kind))), ())


def with_laws(model: Weighed, machine: Device, room: DeviceRoom) -> Device | None:
    """A machine with a device as it was found to be; None if that was not tried."""
    there = accelerator(room, coming_one(model))
    if there is None:
        return None
    # One of which nobody has said anything is taken for a fast one, or a device might make it slower.
    disk = machine.disk_bytes_per_s
    return replace(at_least_fast(machine), disk_bytes_per_s=disk, reads=machine.reads, accelerators=(there,))


def plan_staying(
    model: Weighed,
    contexts: Sequence[Wanted],
    room: DeviceRoom,
    memory_bytes: int,
    machine: Device,
    *,
    long: bool = False,
) -> Plan | Misfit | NoRoomThere:
    """Blocks stay where they are, but for experts or layers that come, from so many tokens on as is worth it. `long`:
    in steps in which they come for as many tokens as a share of both memories allows."""
    if long:
        contexts = [longer_steps(it, room, memory_bytes, PASSING_TOKENS) for it in contexts]
    longest = contexts[0]
    most = longest.chunk_tokens + longest.sequences + longest.guesses
    staged = staged_from(model, machine, room.expert, most) if room.expert else 0
    return plan_on_device(contexts, _sizes(model), room, memory_bytes=memory_bytes, staged_tokens=staged)


def ways_through_device(
    model: Weighed,
    contexts: Sequence[Wanted],
    room: DeviceRoom,
    memory_bytes: int,
    host: Device | None = None,
) -> Iterator[Way]:
    """All layers are computed there, and their weights pass through it in every step. `host`: this machine, if its
    processor may be too slow to attend for prompts."""
    for rows in _attending_rows(model, contexts, room, host):
        made = plan_passing(
            contexts,
            _sizes(model),
            room,
            memory_bytes=memory_bytes,
            vectors_bytes=model.vectors_bytes,
            attending_rows=rows,
        )
        if not isinstance(made, NoRoomThere):
            yield Way(f"through {room.name}{_WHERE_PROMPTS_ATTEND if rows else ''}", 6, made)


def _attending_rows(
    model: Weighed, contexts: Sequence[Wanted], room: DeviceRoom, host: Device | None
) -> tuple[int, ...]:
    """What plans may have: 0, and what may be quicker."""
    there, longest = accelerator(room, coming_one(model)), contexts[0]
    if host is None or there is None:
        return (0,)
    rows = attends_from(model, host, there, longest.kv_type, longest.chunk_tokens)
    return (0, rows) if rows else (0,)


def ways_from_disk(
    model: Weighed,
    contexts: Sequence[Wanted],
    room: DeviceRoom,
    memory_bytes: int,
    host: Device | None = None,
) -> Iterator[Way]:
    """Ways of a model for which device and memory together have too little room. `host`: as above."""
    sizes = ModelBytes(model.extents, 0, model.vectors_bytes)
    made = plan_beside_disk(contexts, sizes, room, memory_bytes=memory_bytes)
    if not isinstance(made, NoRoomThere):
        plan = made.plan if isinstance(made, Misfit) else made
        yield Way(f"{name_of(plan)}, others from disk", 7, made)
    known: list[tuple[int, int]] = []
    rows = _attending_rows(model, contexts, room, host)
    for share, attending in product(_KV_SHARES, rows):
        passing = plan_passing_from_disk(
            contexts, sizes, room, memory_bytes=memory_bytes, kv_share=share, attending_rows=attending
        )
        if isinstance(passing, NoRoomThere):
            continue
        plan = passing.plan if isinstance(passing, Misfit) else passing
        if (key := (plan.kv.pages, plan.attending_rows)) in known:
            continue
        known.append(key)
        more = f", KV for {plan.kv.tokens:,} tokens" if len({pages for pages, _ in known}) > 1 else ""
        more += _WHERE_PROMPTS_ATTEND if plan.attending_rows else ""
        yield Way(f"through {room.name} from disk{more}", 7 + len(known), passing)


def _sizes(model: Weighed) -> ModelBytes:
    tied = sum(it.nbytes for it in model.head) if model.spec.tied and model.spec.vocab else 0
    vectors = 0 if model.quant == "keep" else model.vectors_bytes
    return ModelBytes(model.block_bytes, tied, vectors, model.vectors_bytes)


def ways_with_device(
    model: Weighed,
    contexts: Sequence[Wanted],
    room: DeviceRoom,
    memory_bytes: int,
    machine: Device,
    *,
    named: bool = False,
) -> Iterator[Way]:
    """All ways with a device that are worth a look: with experts or layers that come, and without. To one that was
    `named` experts come wherever they gain anything, as few have to make room for them."""
    known: set[tuple[int, int, int, int]] = set()
    alone = room._replace(expert=None)
    tried = [(6, room, False), (5, room, True), *([] if named and model.spec.moe else [(4, alone, False)])]
    for order, its, long in tried:
        made = plan_staying(model, contexts, its, memory_bytes, machine, long=long)
        if isinstance(made, NoRoomThere):
            continue
        plan = made.plan if isinstance(made, Misfit) else made
        if long and (made is not plan or not plan.staged_tokens):
            continue
        key = plan.device_weights_bytes, plan.staged_tokens, plan.context_tokens, plan.chunk_tokens
        if key not in known:
            known.add(key)
            steps = f", in steps of {plan.chunk_tokens:,}" if long else ""
            yield Way(f"{name_of(plan)}{steps}", order, made)


def name_of(plan: Plan) -> str:
    """What a plan whose blocks stay where they are is called beside others."""
    (mine, whole), (experts, among) = plan.device_layers, plan.device_experts
    if mine < whole:
        parts = f"{mine} of {whole} layers"
    elif experts < among:
        parts = "all but experts" if not experts else f"all but {among - experts:,} of {among:,} experts"
    else:
        parts = "all layers"
    coming = "experts" if among else "others"
    comes = f", {coming} come from {plan.staged_tokens} tokens on" if plan.staged_tokens else ""
    return f"on {plan.device}: {parts}{comes}"
