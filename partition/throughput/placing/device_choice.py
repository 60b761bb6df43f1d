"""Which way with a device a machine takes, or whether none; and why, in a sentence. Pure, and deterministic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import harmonic_mean
from typing import NamedTuple

from ...placement import DeviceRoom, NoRoomThere
from ...plan import Misfit, Plan, Wanted, first_fit
from ..alone import Way, best, best_plan, usual_job
from ..cost import cost, steady_batch
from ..profile import Device
from ..weights_of import Weighed
from .device_ways import plan_staying, ways_from_disk, ways_through_device, ways_with_device, with_laws


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
    """The quickest plan with it for the usual job, within `memory_bytes` of this machine's memory. `many`: nobody waits
    for a single answer. Then weights may pass through the device in every step. `streaming`: what has no room in memory
    may come from disk. Where nothing was tried, the disk is what is known to be slow; and where there are many, the
    processor."""
    here = with_laws(model, machine, room)
    ways = _ways(
        model, contexts, room, memory_bytes, machine, here, many=many, streaming=streaming, named=True
    )
    there = _fitting(ways)
    if not ways:
        return plan_staying(model, contexts, room, memory_bytes, machine)
    if not there:
        return first_fit(way.made for way in ways)
    if here is None:
        return min((plan for _, plan in there), key=lambda it: (many and not it.passes, it.streamed_bytes))
    return _Choice.among(there, model, here, many=many).plan


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
    """The same, or the plan without the device, among those that are hardly slower; with the reason. A machine of which
    nobody has said anything is taken for a fast one, or the device might make it slower."""
    alone = best_plan(model, contexts, memory_bytes, machine, streaming=streaming)
    here = with_laws(model, machine, room)
    assert here is not None
    there = _fitting(
        _ways(model, contexts, room, memory_bytes, machine, here, many=many, streaming=streaming)
    )
    if not there:
        no_room = f"the processor alone: {room.name} has no room for a layer"
        return replace(alone, why=no_room) if isinstance(alone, Plan) else alone
    if not isinstance(alone, Plan):
        too_small = f"{room.name} computes with the processor, whose memory alone is too small"
        return replace(_Choice.among(there, model, here, many=many).plan, why=too_small)
    both = [(Way("the processor alone", 0, alone), alone), *there]
    choice = _Choice.among(both, model, here, many=many)
    return replace(choice.plan, why=choice.why)


def _ways(
    model: Weighed,
    contexts: Sequence[Wanted],
    room: DeviceRoom,
    memory_bytes: int,
    machine: Device,
    here: Device | None,
    *,
    many: bool,
    streaming: bool,
    named: bool = False,
) -> list[Way]:
    """`here`: the machine with the device; None if that was not tried."""
    found = [*ways_with_device(model, contexts, room, memory_bytes, machine, named=named)]
    if many and here is not None:
        found += ways_through_device(model, contexts, room, memory_bytes, here)
    if streaming and not _fitting(found):
        found += ways_from_disk(model, contexts, room, memory_bytes, here)
    return found


def _fitting(ways: Iterable[Way]) -> list[tuple[Way, Plan]]:
    return [(way, way.made) for way in ways if isinstance(way.made, Plan)]


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


class _Choice(NamedTuple):
    """The quickest of some plans for one request, or for `many`, in a context of `context` tokens, which all have.
    `took_s`: what a request takes with each."""

    ways: Sequence[tuple[Way, Plan]]
    took_s: Sequence[float]
    many: bool
    context: int

    @classmethod
    def among(
        cls, ways: Sequence[tuple[Way, Plan]], model: Weighed, machine: Device, *, many: bool
    ) -> _Choice:
        context = min(plan.context_tokens for _, plan in ways)
        job = usual_job(context)

        def took_s(plan: Plan) -> float:
            if many:
                return job.new_tokens / mixed_rate(model, plan, machine, context)
            return cost(model, plan, machine, job).total_s(job)

        return cls(ways, [took_s(plan) for _, plan in ways], many, context)

    @property
    def _place(self) -> int:
        return best(range(len(self.ways)), lambda it: self.ways[it][0].order, self.took_s.__getitem__)

    @property
    def plan(self) -> Plan:
        return self.ways[self._place][1]

    @property
    def why(self) -> str:
        """Beside the first, or the quickest of the others if that is the one."""
        chosen, took_s = self._place, self.took_s
        other = 0 if chosen else min(range(1, len(self.ways)), key=took_s.__getitem__)
        (way, _), (rival, _) = self.ways[chosen], self.ways[other]
        times = f"{took_s[chosen]:.2g} s, {took_s[other]:.2g} s with {rival.name}"
        return f"{way.name}: {self._asked()} {times}"

    def _asked(self) -> str:
        job = usual_job(self.context)
        if not self.many:
            return f"a prompt of {job.prompt_tokens} tokens and an answer of {job.new_tokens} are predicted to take"
        longest = f" (some of {self.context - job.new_tokens})" if self.context > job.context_tokens else ""
        return (
            f"prompts of {job.prompt_tokens} tokens{longest} and answers of {job.new_tokens}, many together, "
            "are predicted to take, each,"
        )
