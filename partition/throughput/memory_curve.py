"""How fast one machine would run a model with more or less memory, and all else as it is. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..plan import Wanted
from .alone import STREAMINGS, best
from .prediction import Job, Prediction
from .profile import Device
from .solve import here
from .weights_of import Weighed

_POINTS = 16
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
    """From the least memory that would do to more than enough, each with the plan that would be taken, be it with a
    device of the machine or without. One that is taken with less memory also runs with more: where another that is
    quicker for the whole job gives tokens more slowly, it is still the best."""
    lacking = here(model, contexts, replace(device, memory_bytes=0.0), job)
    needed = [it.least_bytes for it in lacking if it.lacks_memory]
    least, enough = min(needed), max(needed)
    places = {least + (_BEYOND * enough - least) * i / (_POINTS - 1) for i in range(_POINTS)} | {*needed}
    quickest: Prediction | None = None
    for memory in sorted(places):
        there = replace(device, memory_bytes=float(memory))
        fitting = [it for it in here(model, contexts, there, job, STREAMINGS) if it.fits]
        if fitting:
            made = best(fitting, lambda it: it.order, lambda it: it.prediction.total_s(job)).prediction
            if quickest is None or made.tokens_per_s > quickest.tokens_per_s:
                quickest = made
            yield MemoryPoint(memory, quickest.tokens_per_s, *quickest.band)
