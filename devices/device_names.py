"""How devices are called.

    auto                    whatever is best, as far as that is known
    cpu                     this process's own processors: no device
    cuda:0, cuda:1,16GB     a graphics card; with a size no more of its memory is used
    sim:512MB,2GB/s         a device that the CPU plays, of this size, behind a link of this speed
    sim:1GB,2GB/s,1GB/s,0   … where copies have another speed without page-locked memory, of which there is so much

Knows names. Imports none of what computes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from shoal.partition.amounts import read_bytes

CPU, AUTO = "cpu", "auto"
SIM_LINK_BYTES_PER_S = 16e9  # of a simulated device, each way

_PATTERN = re.compile(r"(?P<kind>cuda|sim):(?P<parts>[^,\s]+(,[^,\s]+){0,3})")
_NUMBER = re.compile("0|[1-9][0-9]{0,3}")  # a card has one name


class DeviceName(NamedTuple):
    """What the name of a device says. `limit_bytes` None: as much as there is. The last two: as `SimDevice` has
    them."""

    kind: str
    number: int = 0
    limit_bytes: int | None = None
    link_bytes_per_s: float = SIM_LINK_BYTES_PER_S
    unpinned_bytes_per_s: float | None = None
    pinnable_bytes: int | None = None


class DeviceNameError(ValueError):
    """What was written is no name of a device."""


def read_name(name: str) -> DeviceName:
    """What a name says. Raises DeviceNameError."""
    if name == CPU:
        return DeviceName(CPU)
    if name.isascii() and (found := _PATTERN.fullmatch(name)) is not None:
        first, *more = found["parts"].split(",")
        said = _card(first, *more) if found["kind"] == "cuda" else _played(first, *more)
        if said is not None:
            return said
    raise DeviceNameError(
        "is no device; write auto, cpu, cuda:0, cuda:0,16GB, or sim:1GB, which the CPU plays"
    )


def _card(number: str, limit: str = "", *more: str) -> DeviceName | None:
    limit_bytes = read_bytes(limit) if limit else None
    if more or not _NUMBER.fullmatch(number) or (limit and not limit_bytes):
        return None
    return DeviceName("cuda", int(number), limit_bytes)


def _played(size: str, link: str = "", unpinned: str = "", pinnable: str = "") -> DeviceName | None:
    limit_bytes, most = read_bytes(size), read_bytes(pinnable) if pinnable else None
    link_s, unpinned_s = _speed(link), _speed(unpinned)
    if (
        not limit_bytes
        or (link and not link_s)
        or (unpinned and not unpinned_s)
        or (pinnable and most is None)
    ):
        return None
    return DeviceName("sim", 0, limit_bytes, link_s or SIM_LINK_BYTES_PER_S, unpinned_s, most)


def _speed(text: str) -> float | None:
    return float(read_bytes(text.removesuffix("/s")) or 0) or None
