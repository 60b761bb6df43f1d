"""How one machine could run a model: all in memory, or some of it through a window; and which of that is best.

The daemon's plans, `shoal show` and `shoal plan` are made here. Pure, and deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from ..plan import Misfit, Plan, Wanted, first_fit, plan_in_ram
from ..streamed_plan import kv_has_room, plan_streamed
from .cost import cost
from .prediction import Job
from .profile import Device
from .weights_of import Weighed

AS_QUICK = 1.03  # times the time of the quickest plan: as good as that, if it is simpler


class Streaming(NamedTuple):
    """How blocks stream: through a window of so many times the usual share of memory; any of them, so that least bytes
    do, or none of the head. Its slices come at the end of a step, one after the other, so little is computed meanwhile:
    where layers hide what is read, more bytes of these take less time."""

    window_times: float = 1.0
    keeps_head: bool = False


USUAL: Mapping[str, Streaming] = {"": Streaming()}
STREAMINGS: Mapping[str, Streaming] = {
    **USUAL,
    "small window": Streaming(0.0),
    "large window": Streaming(4.0),
    "head kept": Streaming(keeps_head=True),
}


class Way(NamedTuple):
    """A plan, or what lacks for one. `order`: the simpler comes first."""

    name: str
    order: int
    made: Plan | Misfit


def ways(
    model: Weighed,
    contexts: Sequence[Wanted],
    memory_bytes: int,
    *,
    streaming: bool = True,
    streamings: Mapping[str, Streaming] = STREAMINGS,
) -> Iterator[Way]:
    """All ways within so much memory, which is the plan's alone; the first is in memory, the second streams as usual.

    contexts: what is asked for, once with each context that would do, the longest first. In memory it gets the longest
    that fits, streamed the longest whose K and V fit into their share. `streaming`: weights may come from disk.
    """
    resident = first_fit(plan_in_ram(it, model.block_bytes, memory_bytes=memory_bytes) for it in contexts)
    yield Way("memory", 0, resident)
    if isinstance(resident, Plan) or not streaming:
        return
    roomy = next((it for it in contexts if kv_has_room(it, memory_bytes)), contexts[-1])
    known: set[tuple[int, int, int]] = set()
    for order, (label, how) in enumerate(streamings.items(), 1):
        made = plan_streamed(
            roomy,
            model.extents,
            model.vectors_bytes,
            memory_bytes=memory_bytes,
            window_times=how.window_times,
            pinnings=model.pinnings_with_head if how.keeps_head else model.pinnings,
        )
        plan = made.plan if isinstance(made, Misfit) else made
        head_bytes = sum(it.nbytes for it in plan.blocks if it.block.kind == "head" and it.tier == "ram")
        key = plan.window_bytes, plan.pinned_bytes, head_bytes
        if key in known or (label and isinstance(made, Misfit)):
            continue
        known.add(key)
        yield Way(f"stream, {label}" if label else "stream", order, made)


def best_plan(
    model: Weighed,
    contexts: Sequence[Wanted],
    memory_bytes: int,
    device: Device,
    *,
    streaming: bool = True,
) -> Plan | Misfit:
    """The plan to run on a device, or what lacks least. It streams as usual unless the device was measured and another
    way is quicker for the usual job; only then is anything predicted."""
    streamings = STREAMINGS if device.measured else USUAL
    found = list(ways(model, contexts, memory_bytes, streaming=streaming, streamings=streamings))
    plans = [(way.order, way.made) for way in found if isinstance(way.made, Plan)]
    if len(plans) < 2:
        return first_fit(way.made for way in found)
    job = usual_job(plans[0][1].context_tokens)
    return best(plans, lambda it: it[0], lambda it: cost(model, it[1], device, job).total_s(job))[1]


def rival_threads(model: Weighed, plan: Plan, device: Device) -> int:
    """Half of a plan's threads, if the band of a token with them overlaps with that of the plan; else 0. Only what was
    measured is worth a trial."""
    half = plan.threads // 2
    if not (half and device.measured):
        return 0
    job = usual_job(plan.context_tokens)
    all_, fewer = (cost(model, it, device, job) for it in (plan, replace(plan, threads=half)))
    return half if fewer.band[1] >= all_.band[0] else 0


def usual_job(context_tokens: int) -> Job:
    """What plans are compared with, if nobody says what for: `Job`'s own figures, less in a context that is shorter."""
    usual = Job()
    if context_tokens >= usual.context_tokens:
        return usual
    new = max(1, context_tokens * usual.new_tokens // usual.context_tokens)
    return Job(max(1, context_tokens - new), new)


Option = TypeVar("Option")


def best(
    pool: Sequence[Option], order: Callable[[Option], int], seconds: Callable[[Option], float]
) -> Option:
    """The quickest; of those that are hardly slower the simplest."""
    taking = [seconds(it) for it in pool]
    least = AS_QUICK * min(taking)
    alike = [(order(it), taken, place) for place, (it, taken) in enumerate(zip(pool, taking, strict=True))]
    return pool[min(it for it in alike if it[1] <= least)[2]]
