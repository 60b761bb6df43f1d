"""Measures the disk that models lie on: reads of several sizes with some in flight, and what reading and computing take
from each other.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from shoal.offload.read_speed import read_speed
from shoal.partition.throughput.profile import Contention, ReadLaw

READS = (256 << 10, 1 << 20, 4 << 20)
READ_S = 0.6
TOGETHER_S = 1.0
WRITTEN_BYTES = 128 << 20
_PIECE = 4 << 20


class DiskFile(NamedTuple):
    """A file to read from, and how fast it was written; 0 if it was there."""

    path: Path
    write_bytes_per_s: float = 0.0


def read_law(path: Path, done: Callable[[str], None]) -> ReadLaw:
    """Bytes per second by the size of reads. Raises OffloadError."""
    speeds = []
    for nbytes in READS:
        done(f"disk, reads of {nbytes >> 10} KiB")
        speeds.append(read_speed(path, READ_S, nbytes))
    return ReadLaw(READS, tuple(max(1.0, speed) for speed in speeds))


def contention(path: Path, compute: Callable[[], object]) -> Contention:
    """What disk and processor keep of their speed while the other works. `compute`: a piece of work, short."""
    alone_s = _pace_s(compute, TOGETHER_S / 2)
    disk_alone = read_speed(path, TOGETHER_S / 2)
    found: list[float] = []

    def reading() -> None:
        until_s = time.monotonic() + TOGETHER_S
        while (left_s := until_s - time.monotonic()) > 0:
            found.append(read_speed(path, left_s))

    thread = threading.Thread(target=reading, name="shoal-measure")
    thread.start()
    together_s = _pace_s(compute, 0.9 * TOGETHER_S)
    thread.join()
    if not found or not disk_alone:
        return Contention()
    return Contention(_share(alone_s / together_s), _share(median(found) / disk_alone))


def _pace_s(compute: Callable[[], object], seconds: float) -> float:
    """Of one piece of work, on average."""
    began_s = time.perf_counter()
    count = 0
    while time.perf_counter() - began_s < seconds:
        compute()
        count += 1
    return (time.perf_counter() - began_s) / max(1, count)


def _share(value: float) -> float:
    return min(1.0, max(0.05, value))


def written(path: Path) -> DiskFile:
    """A new file, and how fast it came to be on the disk. Raises OSError."""
    piece = os.urandom(_PIECE)
    began_s = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(WRITTEN_BYTES // _PIECE):
            file.write(piece)
        os.fsync(file.fileno())
    return DiskFile(path, WRITTEN_BYTES / (time.perf_counter() - began_s))
