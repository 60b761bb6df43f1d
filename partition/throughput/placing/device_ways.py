"""How one machine could run a model with a device, and whether that is better than without. Pure, and deterministic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from statistics import harmonic_mean
from typing import NamedTuple

from ...hardware_guesses import KV_SHARE
from ...placement import (
    DeviceRoom,
    ModelBytes,
    NoRoomThere,
    longer_steps,
    plan_beside_disk,
    plan_on_device,
)
from ...plan import Misfit, Plan, Wanted, first_fit
from ..alone import AS_QUICK, Way, best, best_plan, usual_job
from ..cost import cost, steady_batch
from ..profile import Accelerator, Device
from ..weights_of import Product, Weighed
from .attending_worth import attends_from
from .passing_plans import plan_passing, plan_passing_from_disk
from .rooms import accelerator
from .staging_worth import at_least_fast, staged_from

PASSING_TOKENS = 8192  # of prompts in a step for which weights come to a device
_WHERE_PROMPTS_ATTEND = ", where prompts attend"
_KV_SHARES = (KV_SHARE, 2)  # of memory, for K and V where weights come from disk


def expert_of(model: Weighed) -> Sequence[Product]:
    """The matrices of one expert; none if it has none."""
    return next((kind.expert for kind in model.layer_kinds if kind.expert), ())


def with_laws(model: Weighed, machine: Device, room: DeviceRoom) -> Device | None:
    """A machine with a device as it was found to be; None if that was not tried."""
    there = accelerator(room, expert_of(model))
    return _equipped(machine, there) if there is not None else None


def _equipped(machine: Device, there: Accelerator) -> Device:
    """A machine of which nobody has said anything is taken for a fast one, or a device might make it slower."""
    disk = machine.disk_bytes_per_s
    return replace(at_least_fast(machine), disk_bytes_per_s=disk, reads=machine.reads, accelerators=(there,))


def batch_rate(model: Weighed, plan: Plan, machine: Device) -> float:
    """Tokens of answers per second to many requests of usual length."""
    return steady_batch(model, plan, machine, usual_job(plan.context_tokens)).tokens_per_s


def mixed_rate(model: Weighed, plan: Plan, machine: Device, context_tokens: int) -> float:
    """The same, if one request in four is as long as the context, which in a batch is made for its longest one: a plan
    that is a third slower with usual requests may be many times as fast with long ones."""
    usual = usual_job(context_tokens)
    longest = usual._replace(prompt_tokens=max(usual.prompt_tokens, context_tokens - usual.new_tokens))
    rates = [steady_batch(model, plan, machine, job).tokens_per_s for job in (usual, longest)]
    return harmonic_mean(rates, (3, 1))


def plan_with_device(
    model: Weighed,
    contexts: Sequence[Wanted],
    room: DeviceRoom,
    memory_bytes: int,
    machine: Device,
    *,
    many: bool = False,
    streaming: bool = False,
) -> Plan | Misfit | NoRoomThere:
    """As much of the model as fits there, within `memory_bytes` of this machine's memory; experts come from so many
    tokens on as is worth it. `many`: nobody waits for a single answer. Then weights may pass through the device in
    every step, if that is predicted to be quicker. `streaming`: what has no room in memory may come from disk."""
    made = _staying(model, contexts, room, memory_bytes, machine)
    host = with_laws(model, machine, room)
    if host is not None and room.expert is not None and isinstance(made, Plan):
        longer = _staying(model, contexts, room, memory_bytes, machine, long=True)
        if isinstance(longer, Plan) and longer.staged_experts:
            choice = _Choice(model, host, many, min(made.context_tokens, longer.context_tokens))
            made = best((longer, made), (longer, made).index, choice.seconds)
    if many and host is not None:
        ways = ways_through_device(model, contexts, room, memory_bytes, host)
        passing = [way.made for way in ways if isinstance(way.made, Plan)]
        if passing:
            context = min(
                plan.context_tokens for plan in (*passing, *([made] if isinstance(made, Plan) else []))
            )
            through = max(passing, key=lambda plan: mixed_rate(model, plan, host, context))
            here_rate = mixed_rate(model, made, host, context) if isinstance(made, Plan) else 0.0
            return through if mixed_rate(model, through, host, context) > AS_QUICK * here_rate else made
    if isinstance(made, Plan) or not streaming:
        return made
    found = [way.made for way in ways_from_disk(model, contexts, room, memory_bytes, host)]
    plans = [plan for plan in found if isinstance(plan, Plan)]
    if not plans:
        tried = [it for it in (made, *found) if isinstance(it, Misfit)]
        return first_fit(tried) if tried else made
    context = min(plan.context_tokens for plan in plans)
    job = usual_job(context)

    def worth(plan: Plan) -> tuple[bool, float]:
        """The less the better. Where nothing was tried, the disk is what is known to be slow; and where there are many,
        the processor."""
        if host is None:
            return many and not plan.passes, plan.streamed_bytes
        if many:
            return False, 1 / mixed_rate(model, plan, host, context)
        return False, cost(model, plan, host, job).total_s(job)

    return min(plans, key=worth)


def _staying(
    model: Weighed,
    contexts: Sequence[Wanted],
    room: DeviceRoom,
    memory_bytes: int,
    machine: Device,
    *,
    long: bool = False,
) -> Plan | Misfit | NoRoomThere:
    """Blocks stay where they are, but for experts that come, from so many tokens on as is worth it. `long`: in steps in
    which they come for as many tokens as a share of both memories allows."""
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
    there, longest = accelerator(room, expert_of(model)), contexts[0]
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
    return ModelBytes(model.block_bytes, tied, 0 if model.quant == "keep" else model.vectors_bytes)


def ways_with_device(
    model: Weighed, contexts: Sequence[Wanted], room: DeviceRoom, memory_bytes: int, machine: Device
) -> Iterator[Way]:
    """All ways with a device that are worth a look: with experts that come and without, and with the device's memory
    for what every token reads alone."""
    known: set[tuple[int, int, int, int]] = set()
    alone = room._replace(expert=None)
    for order, its, long in ((6, room, False), (5, room, True), (4, alone, False)):
        made = _staying(model, contexts, its, memory_bytes, machine, long=long)
        if isinstance(made, NoRoomThere):
            continue
        plan = made.plan if isinstance(made, Misfit) else made
        if long and (made is not plan or not plan.staged_experts):
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
    comes = f", experts come from {plan.staged_tokens} tokens on" if plan.staged_experts else ""
    return f"on {plan.device}: {parts}{comes}"


def with_device_or_alone(
    model: Weighed,
    contexts: Sequence[Wanted],
    room: DeviceRoom,
    memory_bytes: int,
    machine: Device,
    *,
    streaming: bool = True,
    many: bool = False,
) -> Plan | Misfit:
    """The plan that is predicted to be the quickest for the usual job, or for `many` of them at once; among those that
    are hardly slower the one without the device. A machine of which nobody has said anything is taken for a fast one,
    or the device might make it slower."""
    assert room.laws is not None
    alone = best_plan(model, contexts, memory_bytes, machine, streaming=streaming)
    here = _equipped(machine, room.laws)
    there = _fitting(ways_with_device(model, contexts, room, memory_bytes, machine))
    if many:
        there += _fitting(ways_through_device(model, contexts, room, memory_bytes, here))
    if streaming and not there:
        there = _fitting(ways_from_disk(model, contexts, room, memory_bytes, here))
    if not there:
        no_room = f"the processor alone: {room.name} has no room for a layer"
        return replace(alone, why=no_room) if isinstance(alone, Plan) else alone
    choice = _Choice(model, here, many, min(plan.context_tokens for _, plan in there))
    if not isinstance(alone, Plan):
        too_small = f"{room.name} computes with the processor, whose memory alone is too small"
        return replace(min((plan for _, plan in there), key=choice.seconds), why=too_small)
    choice = choice._replace(context=min(choice.context, alone.context_tokens))
    return choice.quickest([(Way("the processor alone", 0, alone), alone), *there])


def _fitting(ways: Iterable[Way]) -> list[tuple[Way, Plan]]:
    return [(way, way.made) for way in ways if isinstance(way.made, Plan)]


class _Choice(NamedTuple):
    """Among plans whose contexts have `context` tokens at least, for one request or for `many`."""

    model: Weighed
    machine: Device
    many: bool
    context: int

    def seconds(self, plan: Plan) -> float:
        """Of a request."""
        job = usual_job(self.context)
        if self.many:
            return job.new_tokens / mixed_rate(self.model, plan, self.machine, self.context)
        return cost(self.model, plan, self.machine, job).total_s(job)

    def quickest(self, ways: Sequence[tuple[Way, Plan]]) -> Plan:
        """The first is simpler than the others; it comes before some of them that are hardly quicker."""
        took = [self.seconds(plan) for _, plan in ways]
        places = range(len(ways))
        chosen = best(places, lambda place: ways[place][0].order, took.__getitem__)
        other = 0 if chosen else min(places[1:], key=took.__getitem__)
        (way, plan), (rival, _) = ways[chosen], ways[other]
        times = f"{took[chosen]:.2g} s, {took[other]:.2g} s with {rival.name}"
        return replace(plan, why=f"{way.name}: {self._asked()} {times}")

    def _asked(self) -> str:
        job = usual_job(self.context)
        if not self.many:
            return f"a prompt of {job.prompt_tokens} tokens and an answer of {job.new_tokens} are predicted to take"
        longest = f" (some of {self.context - job.new_tokens})" if self.context > job.context_tokens else ""
        return (
            f"prompts of {job.prompt_tokens} tokens{longest} and answers of {job.new_tokens}, many together, "
            "are predicted to take, each,"
        )
