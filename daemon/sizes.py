"""Amounts of memory as people write them, for whoever asks a person again."""

from __future__ import annotations

from shoal.comm.complaints import shorten
from shoal.partition.amounts import read_bytes

from .errors import DaemonError


def parse_bytes(text: str) -> int:
    """'3GB', '512 MiB' or '1000000' as bytes. Raises DaemonError `bad_request`."""
    if (amount := read_bytes(text)) is not None:
        return amount
    raise DaemonError(
        "bad_request", f"{shorten(text)} is not an amount of memory", "write 3GB, 512MiB or 1000000"
    )
