"""Measures the disk that models lie on: reads of several sizes with some in flight, and what reading and computing take
from each other.

As a window does, the same bytes are read again and again: what lies behind a disk may keep them, here as in a step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

from shoal.offload.read_speed import read_speed
from shoal.partition.throughput.profile import Contention, ReadLaw

from .kernel_laws import ROUNDS

READS = (256 << 10, 1 << 20, 4 << 20)
READ_S = 0.2
TOGETHER_S = 0.3
REREAD_BYTES = 256 << 20  # of a file, that are read
WRITTEN_BYTES = 128 << 20
_PIECE = 4 << 20


class DiskFile(NamedTuple):
    """A file to read from, and how fast it was written; 0 if it was there."""

    path: Path
    write_bytes_per_s: float = 0.0


def reread_speed(path: Path, seconds: float, read_bytes: int = READS[-1]) -> float:
    """Bytes per second, of bytes that were read before (`read_once`). Raises OffloadError."""
    return read_speed(path, seconds, read_bytes, REREAD_BYTES)


def read_once(path: Path) -> None:
    """What is measured later, as far as that takes no longer than a moment. Raises OffloadError."""
    read_speed(path, 1.0, READS[-1], REREAD_BYTES)


def read_law(path: Path, done: Callable[[str], None]) -> tuple[ReadLaw, float]:
    """(bytes per second by the size of reads; how far rounds lay from their middle, as a share of it, with the largest
    ones). Raises OffloadError."""
    read_once(path)
    rounds = []
    for _ in range(ROUNDS):
        speeds = []
        for nbytes in READS:
            done(f"disk, reads of {nbytes >> 10} KiB")
            speeds.append(max(1.0, reread_speed(path, READ_S, nbytes)))
        rounds.append(speeds)
    each = [*zip(*rounds, strict=True)]
    apart = (max(each[-1]) - min(each[-1])) / (2 * median(each[-1]))
    return ReadLaw(READS, tuple(map(median, each))), min(1.0, apart)


def contention(path: Path, compute: Callable[[], object]) -> Contention:
    """What disk and processor keep of their speed while the other works. `compute`: a piece of work, short. Raises
    OffloadError."""
    rounds = [_contention(path, compute) for _ in range(ROUNDS)]
    return Contention(*(_share(median(shares)) for shares in zip(*rounds, strict=True)))


def _contention(path: Path, compute: Callable[[], object]) -> tuple[float, float]:
    """(what the processor keeps, what the disk keeps), each alone and together in turn."""
    alone_s = _pace_s(compute, TOGETHER_S)
    disk_alone = max(1.0, reread_speed(path, TOGETHER_S))
    found: list[float] = []

    def reading() -> None:
        until_s = time.monotonic() + TOGETHER_S
        while (left_s := until_s - time.monotonic()) > 0:
            found.append(reread_speed(path, left_s))

    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(reading)
        together_s = _pace_s(compute, 0.9 * TOGETHER_S)
        read.result()
    return alone_s / together_s, median(found) / disk_alone


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
