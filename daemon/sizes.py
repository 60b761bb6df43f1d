"""Amounts of memory as people write them; `partition.amounts` has how they are said.

Decimal units (1 GB = 10⁹ bytes) as disks and networks have them, and binary ones (1 GiB = 2³⁰).
"""

from __future__ import annotations

import re

from .errors import DaemonError

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
