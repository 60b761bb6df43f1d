"""How fast groups of machines were at a model, and this machine alone: what was predicted may have been wrong.

A processor that somebody else wants, a quota, a radio that is shared: no measurement beforehand tells what they do to
machines that wait for each other after every block. So whoever chooses is told what came out (`group_search.choose`).
The best of the last few times counts: something else may just have run. It is forgotten after a while, as what held a
machine up may be over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

FORGET_S = 1800.0
TIMES = 3  # times, of which the best counts
NEWS = 0.1  # another figure counts as new if it differs by so much of the old one
MOST_MEASURED = 256  # the oldest go first

Machines = frozenset[str]  # fingerprints; empty = this machine alone


class _Measured(NamedTuple):
    latest: tuple[float, ...]  # seconds of a token
    told_s: float  # what it was when `changes` last counted
    at_s: float


class MeasuredGroups:
    """By model and machines. Called by one thread at a time. `changes` counts what is new."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[tuple[str, Machines], _Measured] = {}
        self.changes = 0

    def note(self, model: str, machines: Machines, token_s: float) -> None:
        """These machines took so long for a token."""
        key, now_s = (model, machines), self._clock()
        latest, told_s, _ = self._kept.pop(key, _Measured((), 0.0, now_s))
        latest = (*latest, token_s)[-TIMES:]
        if abs(min(latest) - told_s) > NEWS * told_s:
            told_s = min(latest)
            self.changes += 1
        self._kept[key] = _Measured(latest, told_s, now_s)
        if len(self._kept) > MOST_MEASURED:
            del self._kept[next(iter(self._kept))]

    def token_s(self, model: str) -> Mapping[Machines, float]:
        """Of all machines that this model was measured on lately."""
        since_s = self._clock() - FORGET_S
        kept = self._kept.items()
        return {it: found.told_s for (of, it), found in kept if of == model and found.at_s >= since_s}
