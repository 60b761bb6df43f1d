"""How one machine could run a model with a device, and whether that is better than without. Pure, and deterministic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...placement import DeviceRoom, ExpertTimes, ModelBytes, NoRoomThere, plan_on_device
from ...plan import Misfit, Plan, Wanted
from ..alone import Way, best, best_plan, usual_job
from ..cost import cost
from ..laws import products
from ..profile import Accelerator, Device
from ..staging_worth import FAST, staged_from
from ..weights_of import Weighed

_TRIED_ROWS = 64  # of an expert, by which it is judged whether it should come


def room_of(there: Accelerator, model: Weighed) -> DeviceRoom:
    """Of a device that is not here, or not open."""
    kind = next((kind for kind in model.layer_kinds if kind.expert), None)
    expert = None
    if kind is not None:
        nbytes = sum(it.nbytes for it in kind.expert)
        computed_s = products(there.computing, kind.expert, _TRIED_ROWS).seconds
        expert = ExpertTimes(nbytes, nbytes / there.host_bytes_per_s, _TRIED_ROWS, computed_s)
    memory = int(there.memory_bytes)
    return DeviceRoom(there.name, memory, int(there.scratch_bytes), True, memory, expert, there)


def plan_with_device(
    model: Weighed, contexts: Sequence[Wanted], room: DeviceRoom, memory_bytes: int, machine: Device
) -> Plan | Misfit | NoRoomThere:
    """As much of the model as fits there, within `memory_bytes` of this machine's memory; experts come from so many
    tokens on as is worth it."""
    tied = sum(it.nbytes for it in model.head) if model.spec.tied and model.spec.vocab else 0
    vectors = 0 if model.quant == "keep" else model.vectors_bytes
    longest = contexts[0]
    most = longest.chunk_tokens + longest.sequences + longest.guesses
    return plan_on_device(
        contexts,
        ModelBytes(model.block_bytes, tied, vectors),
        room,
        memory_bytes=memory_bytes,
        staged_tokens=staged_from(model, machine, room.expert, most) if room.expert else 0,
    )


def ways_with_device(
    model: Weighed, contexts: Sequence[Wanted], room: DeviceRoom, memory_bytes: int, machine: Device
) -> Iterator[Way]:
    """All ways with a device that are worth a look: with experts that come and without, and with the device's memory
    for what every token reads alone."""
    known: set[tuple[int, int, int]] = set()
    for order, expert in enumerate((room.expert, None)):
        made = plan_with_device(model, contexts, room._replace(expert=expert), memory_bytes, machine)
        if isinstance(made, NoRoomThere):
            return
        plan = made.plan if isinstance(made, Misfit) else made
        if (key := (plan.device_weights_bytes, plan.staged_tokens, plan.context_tokens)) not in known:
            known.add(key)
            yield Way(name_of(plan), 4 - order, made)


def name_of(plan: Plan) -> str:
    """What a plan with a device is called beside others."""
    (mine, whole), (experts, among) = plan.device_layers, plan.device_experts
    if mine < whole:
        parts = f"{mine} of {whole} layers"
    elif experts < among:
        parts = "all but experts" if not experts else f"all but {among - experts:,} of {among:,} experts"
    else:
        parts = "all layers"
    comes = f", experts come from {plan.staged_tokens} tokens on" if plan.staged_experts else ""
    return f"{plan.device}: {parts}{comes}"


def with_device_or_alone(
    model: Weighed,
    contexts: Sequence[Wanted],
    room: DeviceRoom,
    memory_bytes: int,
    machine: Device,
    *,
    streaming: bool = True,
) -> Plan | Misfit:
    """The plan that is predicted to be the quickest for the usual job; among those that are hardly slower the one
    without the device. A machine that nobody measured is taken for a fast one, or the device might make it slower."""
    assert room.laws is not None
    alone = best_plan(model, contexts, memory_bytes, machine, streaming=streaming)
    found = [*ways_with_device(model, contexts, room, memory_bytes, machine)]
    there = [way for way in found if isinstance(way.made, Plan)]
    if isinstance(alone, Misfit) or not there:
        if there:
            plan = there[0].made
            assert isinstance(plan, Plan)
            return replace(
                plan, why=f"{room.name} computes with the processor, whose memory alone is too small"
            )
        if isinstance(alone, Plan):
            alone = replace(alone, why=f"the processor alone: {room.name} has no room for a layer")
        return alone
    disk = machine.disk_bytes_per_s
    here = machine if machine.measured else replace(FAST, disk_bytes_per_s=disk, threads=machine.threads)
    here = replace(here, accelerators=(room.laws,))
    ways = [Way("the processor alone", 0, alone), *there]
    job = usual_job(min(way.made.context_tokens for way in ways if isinstance(way.made, Plan)))

    def seconds(way: Way) -> float:
        assert isinstance(way.made, Plan)
        return cost(model, way.made, here, job).total_s(job)

    chosen = best(ways, lambda way: way.order, seconds)
    others = ways[1:] if chosen is ways[0] else ways[:1]
    other = min(others, key=seconds)
    assert isinstance(chosen.made, Plan)
    why = (
        f"{chosen.name}: a prompt of {job.prompt_tokens} tokens and an answer of {job.new_tokens} are predicted to "
        f"take {seconds(chosen):.2g} s, {seconds(other):.2g} s with {other.name}"
    )
    return replace(chosen.made, why=why)
