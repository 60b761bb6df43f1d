"""How fast one machine would run a model with more or less memory, and all else as it is. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..plan import Misfit, Plan, Wanted
from .alone import STREAMINGS, USUAL, best, ways
from .cost import cost
from .peak import beside_bytes
from .prediction import Job
from .profile import Device
from .weights_of import Weighed

_POINTS = 24
_BEYOND = 1.1  # times the memory with which all of it stays


class MemoryPoint(NamedTuple):
    """With so much memory, all in all, so many tokens a second: about, at least, at most."""

    memory_bytes: float
    tokens_per_s: float
    low: float
    high: float


def memory_curve(
    model: Weighed, contexts: Sequence[Wanted], device: Device, job: Job
) -> Iterator[MemoryPoint]:
    """From the least memory that would do to more than enough, each with the plan that would be taken."""
    more = beside_bytes(model, contexts[0].kv_type)
    streaming = device.disk_bytes_per_s > 0
    lacking = [way.made for way in ways(model, contexts, 0, streaming=streaming, streamings=USUAL)]
    needed = [made.least_bytes for made in lacking if isinstance(made, Misfit)]
    least, enough = min(needed), needed[0]
    places = {least + (_BEYOND * enough - least) * i / (_POINTS - 1) for i in range(_POINTS)} | {enough}
    for memory in sorted(places):
        there = replace(device, memory_bytes=memory + more)
        found = [
            (way.order, cost(model, way.made, there, job))
            for way in ways(model, contexts, int(memory), streaming=streaming, streamings=STREAMINGS)
            if isinstance(way.made, Plan)
        ]
        if found:
            _, made = best(found, lambda it: it[0], lambda it: it[1].total_s(job))
            yield MemoryPoint(memory + more, made.tokens_per_s, *made.band)
