"""Amounts of bytes and seconds as people write and read them.

Decimal units (1 GB = 10⁹ bytes) as disks and networks have them, and binary ones (1 GiB = 2³⁰).
"""

from __future__ import annotations

import re

from shoal.partition.amounts import counted, format_bytes

from .errors import DaemonError

__all__ = ["counted", "format_bytes", "format_duration", "parse_bytes"]

_UNITS = {
    "": 1,
    "b": 1,
    **{prefix + suffix: 1000**n for n, prefix in enumerate("kmgt", 1) for suffix in ("", "b")},
    **{prefix + "ib": 1024**n for n, prefix in enumerate("kmgt", 1)},
}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """'3GB', '512 MiB' or '1000000' as bytes. Raises DaemonError `bad_request`."""
    match = _PATTERN.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise DaemonError(
            "bad_request", f"{text!r} is not an amount of memory", "write 3GB, 512MiB or 1000000"
        )
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_duration(seconds: float) -> str:
    """'45 s', '3 min 20 s', '2 h 5 min', '4 d 3 h'."""
    whole = max(0, int(seconds))
    for unit, size, lower, lower_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            rest = whole % size // lower_size
            return f"{whole // size} {unit} {rest} {lower}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"
