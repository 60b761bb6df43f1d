"""What things that go on beside each other take from each other, as it was measured of two at a time.

How much slower a thing is depends on how long the others work meanwhile, and that on how slow they are; so a step is
gone through until that settles. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .profile import Device

_SETTLED = 2e-3  # until nothing changes by more than this, or …
# … for so many rounds, of each of which so much counts: it swings about where it settles, and the more widely, the less
# things keep of their speed.
_COUNTS = (1.0, *(0.5,) * 8, *(0.25,) * 12, *(0.1,) * 20)

GoneThrough = TypeVar("GoneThrough")
Slower = tuple[float, ...]
"""How many times longer each thing takes than alone."""


def settled(gone_through: Callable[[Slower], tuple[GoneThrough, Slower]], things: int) -> GoneThrough:
    """What is found of a step of so many things, which go on beside each other. `gone_through`: what is found if each
    takes so many times as long, and how many times as long each would then take."""
    slower = (1.0,) * things
    for share in _COUNTS:
        found, now = gone_through(slower)
        if all(abs(one / other - 1) < _SETTLED for one, other in zip(now, slower, strict=True)):
            break
        slower = tuple(other + share * (one - other) for one, other in zip(now, slower, strict=True))
    return found


def together(device: Device, computing: float, reading: float) -> tuple[float, float]:
    """How many times longer computing takes, and reading, if they do so for these shares of the other's time: whatever
    one does while the other works takes longer. What reading needs of a processor finds room between computing at
    first, so of the share in which something is computed its square counts (docs/throughput-model.md)."""
    keeps = device.contention
    return longer(keeps.compute_keeps, reading), longer(keeps.disk_keeps, computing**2)


def longer(keeps: float, share: float) -> float:
    """How many times longer something takes that keeps so much of its speed for this share of the time."""
    return 1 / (1 - (1 - keeps) * min(1.0, share))


def shares(step_s: float, stall_s: float, disk_s: float) -> tuple[float, float]:
    """(of the time in which the disk reads, how much of it something is computed; of that in which something is, how
    much of it the disk reads), in a step in which the processor waits for the disk for `stall_s` and the disk reads for
    `disk_s`. While the processor waits the disk reads, so what it reads besides it reads beside computing."""
    both_s = max(0.0, disk_s - stall_s)
    return both_s / max(disk_s, 1e-12), both_s / max(step_s - stall_s, 1e-12)
