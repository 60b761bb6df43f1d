"""How fast groups of machines were at a model, and this machine alone: what was predicted may have been wrong.

A processor that somebody else wants, a quota, a radio that is shared: no measurement beforehand tells what they do to
machines that wait for each other after every block. So whoever chooses is told what came out (`group_search.choose`).
Something else may just have run, so it is told what came out twice, and the best of the last few times counts. It is
forgotten after a while, as what held a machine up may be over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

FORGET_S = 1800.0
TIMES = 3  # of which the best counts
CONFIRMED = 2  # times that it was measured, at least
NEWS = 0.1  # another figure counts as new if it differs by so much of the old one
MOST_MEASURED = 64  # the oldest go first

Machines = frozenset[str]  # fingerprints; empty = this machine alone


class _Measured(NamedTuple):
    latest: tuple[float, ...]  # seconds of a token
    told_s: float  # what it was when `changes` last counted; 0 = nobody was told
    at_s: float


class MeasuredGroups:
    """By model and machines. Any thread may call it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[tuple[str, Machines], _Measured] = {}
        self._changes = 0
        self._lock = threading.Lock()

    @property
    def changes(self) -> int:
        """Counts what is new, and what is forgotten."""
        with self._lock:
            self._forget()
            return self._changes

    def note(self, model: str, machines: Machines, token_s: float) -> None:
        """These machines took so long for a token."""
        with self._lock:
            self._forget()
            key, now_s = (model, machines), self._clock()
            latest, told_s, _ = self._kept.pop(key, _Measured((), 0.0, now_s))
            latest = (*latest, token_s)[-TIMES:]
            if len(latest) >= CONFIRMED and abs(min(latest) - told_s) > NEWS * told_s:
                told_s = min(latest)
                self._changes += 1
            self._kept[key] = _Measured(latest, told_s, now_s)
            if len(self._kept) > MOST_MEASURED:
                del self._kept[next(iter(self._kept))]

    def token_s(self, model: str) -> Mapping[Machines, float]:
        """Of all machines that this model was measured on lately."""
        with self._lock:
            self._forget()
            kept = self._kept.items()
            return {machines: found.told_s for (of, machines), found in kept if of == model and found.told_s}

    def _forget(self) -> None:
        since_s = self._clock() - FORGET_S
        for key in [key for key, found in self._kept.items() if found.at_s < since_s]:
            self._changes += bool(self._kept.pop(key).told_s)
