"""Which plans there are for a job, what each would do, and which one is best.

Bits are never taken from a model unasked: plans with the weights as they are stored come first, and those with fewer
bits count only if somebody asked for them or nothing else runs. Among plans that give the same texts the quickest is
taken; one that is hardly slower and simpler is preferred. Pure, and deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..amounts import format_bytes, rounded_up
from ..group_choice import Choice, NoGroup
from ..hardware_guesses import DISK_BYTES_PER_S
from ..memory_layout import PAGE_TOKENS
from ..plan import Misfit, Plan, Wanted
from ..sum_cost import Wire
from .alone import STREAMINGS, USUAL, Streaming, best, ways
from .cost import cost
from .group_plans import Groups
from .peak import beside_bytes
from .placing.device_ways import (
    PASSING_TOKENS,
    coming_one,
    ways_from_disk,
    ways_through_device,
    ways_with_device,
)
from .placing.rooms import room_of
from .prediction import Job, Prediction
from .profile import Device, Profile
from .weights_of import Weighed

_EACH_SIZE = 8
_OF_MEMORY = " of memory"


class Choices(NamedTuple):
    """What somebody insists on; None leaves it open. Each fixes that choice and no other. Bits are fixed by giving one
    model only, the context by what is `wanted`. `wires`: what the sums of a group may be rounded to; f32 is exact."""

    kv_type: str | None = None
    threads: int | None = None
    ranks: int | None = None
    wires: tuple[Wire, ...] = ("f32",)


@dataclass(frozen=True)
class Candidate:
    """A plan, and what it would do. `missing`: what the machines lack for it, in words; "" if it fits. `least_bytes`:
    memory of the first machine with which it would fit. `order`: the simpler comes first."""

    name: str
    model: Weighed
    kv_type: str
    prediction: Prediction
    missing: str
    least_bytes: int
    order: int
    plan: Plan | None = None  # None: a group's
    asked: bool = True  # whether it may be chosen before others have been found not to run

    @property
    def fits(self) -> bool:
        return not self.missing

    @property
    def lacks_memory(self) -> bool:
        """And nothing else."""
        return self.missing.endswith(_OF_MEMORY)


class Solved(NamedTuple):
    """All plans that were looked at, and the one to run; None if none fits. `no_group`: if several machines were
    insisted on, why they cannot."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    job: Job
    no_group: str = ""


Asks = Callable[[Weighed, str, int], Sequence[Wanted]]
"""(model, kv_type, threads) → what a plan is asked for, once with each context that would do, the longest first."""


def asks(
    job: Job,
    context_tokens: int | None,
    chunk_tokens: int,
    sequences: int,
    guesses: int,
    *,
    narrow_inputs: bool = False,
) -> Asks:
    """For a job: K and V of its streams and no more."""
    context = context_tokens or job.context_tokens
    tokens = job.batch * -(-context // PAGE_TOKENS) * PAGE_TOKENS

    def wanted(model: Weighed, kv_type: str, threads: int) -> list[Wanted]:
        streams = max(sequences, job.batch)
        its = context, tokens, kv_type, chunk_tokens, streams, guesses, threads
        return [Wanted(model.spec, *its, narrow_inputs=narrow_inputs)]

    return wanted


def solve(
    models: Sequence[Weighed],
    wanted: Asks,
    profile: Profile,
    job: Job,
    choices: Choices = Choices(),  # noqa: B008
) -> Solved:
    """`models`: the model in each of the types that it may be kept in, most bits first."""
    refused: list[NoGroup] = []
    found = tuple(_candidates(models, wanted, profile, job, choices, refused))
    insisted = refused[:1] if choices.ranks is not None and not found else []
    return Solved(found, _best(found, job), job, "".join(it.describe() for it in insisted))


def _best(candidates: Sequence[Candidate], job: Job) -> Candidate | None:
    fitting = [it for it in candidates if it.fits]
    pool = [it for it in fitting if it.asked] or _most_faithful(fitting)
    if not pool:
        return None
    return best(pool, lambda it: it.order, lambda it: it.prediction.total_s(job))


def _most_faithful(fitting: Sequence[Candidate]) -> list[Candidate]:
    """Those that keep most of the model."""
    if not fitting:
        return []
    first = fitting[0]  # they come in the order of bits
    return [it for it in fitting if (it.model.quant, it.kv_type) == (first.model.quant, first.kv_type)]


def _candidates(
    models: Sequence[Weighed],
    wanted: Asks,
    profile: Profile,
    job: Job,
    choices: Choices,
    refused: list[NoGroup],
) -> Iterator[Candidate]:
    """`refused` gets the groups that there cannot be."""
    device = profile.head.on(choices.threads)
    kinds = [choices.kv_type] if choices.kv_type else ["f16", "i8"]
    for place, model in enumerate(models):
        for number, kv_type in enumerate(kinds):
            asked = not place and not number
            asking = wanted(model, kv_type, device.threads)
            labels = [model.quant if model.quant != "keep" else "", f"KV {kv_type}" if number else ""]
            suffix = "".join(f", {label}" for label in labels if label)
            if choices.ranks in (None, 1):
                for found in here(model, asking, device, job, STREAMINGS if asked else USUAL):
                    yield replace(found, name=found.name + suffix, asked=asked)
            if not number and len(profile.devices) > 1:
                for found in _groups(model, asking[0], profile, job, choices, refused):
                    yield replace(found, name=found.name + suffix, asked=asked)


def here(
    model: Weighed,
    asking: Sequence[Wanted],
    device: Device,
    job: Job,
    streamings: Mapping[str, Streaming] = USUAL,
) -> Iterator[Candidate]:
    """All plans of one machine, without its devices and with each."""
    yield from _alone(model, asking, device, job, streamings)
    yield from _with_devices(model, asking, device, job)


def _alone(
    model: Weighed, asking: Sequence[Wanted], device: Device, job: Job, streamings: Mapping[str, Streaming]
) -> Iterator[Candidate]:
    more = beside_bytes(model, asking[0].kv_type)
    for name, order, made in ways(
        model, asking, max(0, int(device.memory_bytes) - more), streamings=streamings
    ):
        if name == "memory" or device.disk_bytes_per_s:
            yield _candidate(name, order, model, made, device, job, more)
        else:  # what a usual one would do, and the least memory that would do with it
            there = replace(device, disk_bytes_per_s=DISK_BYTES_PER_S)
            found = _candidate(name, order, model, made, there, job, more)
            least = min(it.made.least_bytes for it in ways(model, asking, 0) if isinstance(it.made, Misfit))
            yield replace(found, missing="a disk to stream from", least_bytes=least + more)


def _with_devices(model: Weighed, asking: Sequence[Wanted], device: Device, job: Job) -> Iterator[Candidate]:
    """Each device of this machine computes with it: what fits there, or all layers, whose weights pass through it. That
    takes long steps. Where memory has no room for all of them, they come from disk."""
    more = beside_bytes(model, asking[0].kv_type)
    memory_bytes = max(0, int(device.memory_bytes) - more)
    asking = [it._replace(narrow_inputs=False) for it in asking]
    long = [it._replace(chunk_tokens=max(it.chunk_tokens, PASSING_TOKENS)) for it in asking]
    for its in device.accelerators:
        room = room_of(its, coming_one(model))
        staying = [*ways_with_device(model, asking, room, memory_bytes, device)]
        passing = [*ways_through_device(model, long, room, memory_bytes, device)]
        found = [*staying, *passing]
        lacks = not any(isinstance(way.made, Plan) for way in passing or staying)
        if device.disk_bytes_per_s and lacks:
            found += ways_from_disk(model, asking, room, memory_bytes, device)
        for name, order, made in found:
            yield _candidate(name, order, model, made, device, job, more)


def _candidate(
    name: str, order: int, model: Weighed, made: Plan | Misfit, device: Device, job: Job, more: int
) -> Candidate:
    plan = made.plan if isinstance(made, Misfit) else made
    least = (made.least_bytes if isinstance(made, Misfit) else plan.peak_bytes) + more
    lacks = max(0, least - int(device.memory_bytes)) if isinstance(made, Misfit) else 0
    missing = f"{format_bytes(rounded_up(lacks))}{_OF_MEMORY}" if lacks else ""
    return Candidate(name, model, plan.kv.dtype, cost(model, plan, device, job), missing, least, order, plan)


def _groups(
    model: Weighed,
    asking: Wanted,
    profile: Profile,
    job: Job,
    choices: Choices,
    refused: list[NoGroup],
) -> Iterator[Candidate]:
    ranks, groups = choices.ranks, Groups(model, asking, profile, job, choices.wires)
    for count in _sizes(len(profile.devices)) if ranks is None else (ranks,):
        if count < 2:
            continue
        choice = groups.of(count)
        if isinstance(choice, NoGroup):
            refused.append(choice)
            continue
        prediction = groups.cost(choice)
        yield Candidate(f"group of {count}", model, asking.kv_type, prediction, "", 0, 10 + count)
    if ranks is None:
        choice = groups.of(None)
        if isinstance(choice, Choice) and choice.split == "prompts":
            count, prediction = len(choice.ranks), groups.cost(choice)
            yield Candidate(f"prompts by {count}", model, asking.kv_type, prediction, "", 0, 10 + count)


def _sizes(machines: int) -> Sequence[int]:
    """Of groups that are looked at: each up to `_EACH_SIZE`, then some, and all."""
    return [it for it in range(2, machines + 1) if it <= _EACH_SIZE or it % 8 == 0 or it == machines]
