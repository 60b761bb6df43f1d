"""How devices are called.

    auto                    whatever is best, as far as that is known
    cpu                     this process's own processors: no device
    cuda:0, cuda:1,16GB     a graphics card; with a size no more of its memory is used
    sim:512MB,2GB/s         a device that the CPU plays, of this size, behind a link of this speed

Knows names. Imports none of what computes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from shoal.partition.amounts import read_bytes

CPU, AUTO = "cpu", "auto"
SIM_LINK_BYTES_PER_S = 16e9  # of a simulated device, each way

_PATTERN = re.compile(r"(?P<kind>cuda|sim):(?P<first>[^,\s]+)(,(?P<second>[^,\s]+))?")
_NUMBER = re.compile("0|[1-9][0-9]{0,3}")  # a card has one name


class DeviceName(NamedTuple):
    """What the name of a device says. `limit_bytes` None: as much as there is."""

    kind: str
    number: int = 0
    limit_bytes: int | None = None
    link_bytes_per_s: float = SIM_LINK_BYTES_PER_S


class DeviceNameError(ValueError):
    """What was written is no name of a device."""


def read_name(name: str) -> DeviceName:
    """What a name says. Raises DeviceNameError."""
    if name == CPU:
        return DeviceName(CPU)
    if name.isascii() and (found := _PATTERN.fullmatch(name)) is not None:
        first, second = found["first"], found["second"]
        if found["kind"] == "cuda" and _NUMBER.fullmatch(first):
            limit = read_bytes(second) if second else None
            if not second or limit:
                return DeviceName("cuda", int(first), limit)
        elif found["kind"] == "sim" and (size := read_bytes(first)):
            speed = read_bytes(second.removesuffix("/s")) if second else int(SIM_LINK_BYTES_PER_S)
            if speed:
                return DeviceName("sim", 0, size, float(speed))
    raise DeviceNameError(
        "is no device; write auto, cpu, cuda:0, cuda:0,16GB, or sim:1GB, which the CPU plays"
    )
