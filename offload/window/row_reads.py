"""Which bytes of an embedding on disk hold given rows, and how to fetch them in few reads. Pure arithmetic.

Rows lie in bands; a read is of whole pages of 4 KiB. Bands that are near each other are read together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shoal.offload.pack.manifest import PAGE_BYTES


class Run(NamedTuple):
    """One read of `nbytes` from `offset`. Bands [first, last] begin at its byte `skip`."""

    first: int
    last: int
    offset: int
    nbytes: int
    skip: int


def runs(bands: Sequence[int], band_bytes: int, base: int, *, near_bytes: int, most_bytes: int) -> list[Run]:
    """The reads that fetch `bands`, ascending, of a matrix that begins at byte `base` of its file.

    Bands with at most `near_bytes` between them are read together, as long as a read has at most `most_bytes`.
    """
    groups: list[list[int]] = []
    for band in bands:
        near = groups and (band - groups[-1][1] - 1) * band_bytes <= near_bytes
        if near and (band + 1 - groups[-1][0]) * band_bytes + 2 * PAGE_BYTES <= most_bytes:
            groups[-1][1] = band
        else:
            groups.append([band, band])
    return [_run(first, last, band_bytes, base) for first, last in groups]


def batches(reads: Sequence[Run], room_bytes: int) -> Iterator[list[tuple[int, Run]]]:
    """The reads in order, as many at a time as fit into `room_bytes`, each with its position there."""
    batch: list[tuple[int, Run]] = []
    held = 0
    for run in reads:
        if batch and held + run.nbytes > room_bytes:
            yield batch
            batch, held = [], 0
        batch.append((held, run))
        held += run.nbytes
    if batch:
        yield batch


def _run(first: int, last: int, band_bytes: int, base: int) -> Run:
    start, end = base + first * band_bytes, base + (last + 1) * band_bytes
    offset = start // PAGE_BYTES * PAGE_BYTES
    return Run(first, last, offset, -(-(end - offset) // PAGE_BYTES) * PAGE_BYTES, start - offset)
