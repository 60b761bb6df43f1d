"""Measures the disk that models lie on: blocks of several sizes, and rings of several, as they pass through a window
(`offload.window.passing_speed`), and what reading and computing take from each other.

As a model's window does, the same bytes are read again and again: what lies behind a disk may keep them, here as in a
step.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from shoal.offload.read_speed import read_speed
from shoal.offload.window.passing_speed import passing_speed
from shoal.partition.throughput.profile import Contention, ReadLaw, RingLaw

from .kernel_laws import ROUNDS

READS = (256 << 10, 1 << 20, 4 << 20)  # blocks, through the largest of …
RINGS = (16 << 20, 32 << 20, 64 << 20)  # … which no cache holds; blocks of half their size pass through these
READ_S = 0.2
TURNS, TURN_S = 5, 0.15  # of reading and computing together, between those alone
BEGINNING_S = 2.0  # until reading has begun
REREAD_BYTES = 256 << 20  # of a file, that are read
WRITTEN_BYTES = 128 << 20
_PIECE = 4 << 20


class DiskFile(NamedTuple):
    """A file to read from, and how fast it was written; 0 if it was there."""

    path: Path
    write_bytes_per_s: float = 0.0


def reread_speed(
    path: Path, seconds: float, block_bytes: int = READS[-1], ring_bytes: int = RINGS[-1]
) -> float:
    """Bytes per second, of bytes that were read before (`read_once`). Raises OffloadError."""
    return max(1.0, passing_speed(path, seconds, block_bytes, ring_bytes, REREAD_BYTES))


def read_once(path: Path) -> None:
    """What is measured later, as far as that takes no longer than a moment. Raises OffloadError."""
    read_speed(path, 1.0, READS[-1], REREAD_BYTES)


def read_law(path: Path, done: Callable[[str], None]) -> tuple[ReadLaw, float]:
    """(the law; how far rounds lay from their middle, as a share of it, with the largest blocks and ring). Raises
    OffloadError."""
    read_once(path)
    points = [(nbytes, RINGS[-1]) for nbytes in READS] + [(nbytes // 2, nbytes) for nbytes in RINGS]
    rounds: list[list[float]] = []
    for _ in range(ROUNDS):
        rounds.append([])
        for block_bytes, ring_bytes in points:
            done(f"disk, blocks of {block_bytes >> 10} KiB through {ring_bytes >> 20} MiB")
            rounds[-1].append(reread_speed(path, READ_S, block_bytes, ring_bytes))
    each = [*zip(*rounds, strict=True)]
    apart = (max(each[-1]) - min(each[-1])) / (2 * median(each[-1]))
    usual = tuple(map(median, each))
    return ReadLaw(READS, usual[: len(READS)], RingLaw(RINGS, usual[len(READS) :])), min(1.0, apart)


def brief_read_law(path: Path, seconds: float) -> ReadLaw:
    """The same with the largest blocks, and the smallest and the largest ring, once. Raises OffloadError."""
    read_once(path)
    ends = RINGS[0], RINGS[-1]
    least, most = (reread_speed(path, seconds, nbytes // 2, nbytes) for nbytes in ends)
    return ReadLaw(READS[-1:], (most,), RingLaw(ends, (least, most)))


def contention(path: Path, compute: Callable[[], object]) -> Contention:
    """What disk and processor keep of their speed while the other works. `compute`: a piece of work, short. Raises
    OffloadError."""
    alone, both = [_alone(path, compute)], list[_Paces]()
    for _ in range(TURNS):
        both.append(_together(path, compute))
        alone.append(_alone(path, compute))
    # A disk that others share changes its speed within seconds: each is compared with what was just before and after.
    beside = [_Paces(*map(fmean, zip(*its, strict=True))) for its in pairwise(alone)]
    computed = median(one.compute_s / two.compute_s for one, two in zip(beside, both, strict=True))
    read = median(two.bytes_per_s / one.bytes_per_s for one, two in zip(beside, both, strict=True))
    return Contention(_share(computed), _share(read))


class _Paces(NamedTuple):
    compute_s: float  # of one piece of work
    bytes_per_s: float


def _alone(path: Path, compute: Callable[[], object]) -> _Paces:
    return _Paces(_pace_s(compute, TURN_S), _passing(path))


def _together(path: Path, compute: Callable[[], object]) -> _Paces:
    began = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(_passing, path, began.set)
        began.wait(BEGINNING_S)  # an error is heard below
        return _Paces(_pace_s(compute, 0.9 * TURN_S), read.result())


def _passing(path: Path, began: Callable[[], object] = lambda: None) -> float:
    """Bytes per second, through a ring of middle size."""
    ring_bytes = RINGS[len(RINGS) // 2]
    return max(1.0, passing_speed(path, TURN_S, ring_bytes // 2, ring_bytes, REREAD_BYTES, began))


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
