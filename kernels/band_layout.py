"""Bands: how the rows of a quantised matrix lie in memory.

Sixteen rows make a band. The first block of a band holds the first blocks of its rows, and so on. These are cut into
pieces of four bytes (numbers in half precision are pieces of two), and the same pieces of all rows lie side by side. So
bytes are only permuted within sixteen rows, and a band is a pure function of its rows. Knows the permutation; not what
the bytes mean.
"""

from collections.abc import Iterator

import numpy as np

from shoal.kernels.arrays import Bytes
from shoal.kernels.types import WeightType
from shoal.partition.memory_layout import BAND_ROWS


def to_bands(kind: WeightType, stored: Bytes) -> Bytes:
    """Puts rows as files hold them, uint8 (n, row bytes), into bands, uint8 (n / 16, 16 * row bytes); the last band is
    filled up with zeros. Rows of a float type stay as they are."""
    rows, row_bytes = stored.shape
    if not kind.quantised:
        return stored
    stored = np.pad(stored, ((0, -rows % BAND_ROWS), (0, 0)))
    blocks = row_bytes // kind.block_bytes
    rows_first = stored.reshape(-1, BAND_ROWS, blocks, kind.block_bytes)
    bands = np.empty((rows_first.shape[0], blocks, BAND_ROWS * kind.block_bytes), np.uint8)
    for start, stop, size in _runs(kind):
        pieces = rows_first[..., start:stop].reshape(*rows_first.shape[:3], (stop - start) // size, size)
        side_by_side = pieces.transpose(0, 2, 3, 1, 4).reshape(*bands.shape[:2], BAND_ROWS * (stop - start))
        bands[..., BAND_ROWS * start : BAND_ROWS * stop] = side_by_side
    return bands.reshape(len(bands), BAND_ROWS * row_bytes)


def from_bands(kind: WeightType, bands: Bytes) -> Bytes:
    """The inverse of `to_bands`: bands, uint8 (n, 16 * row bytes), as rows (16 * n, row bytes)."""
    if not kind.quantised:
        return bands
    count, band_bytes = bands.shape
    blocks = band_bytes // BAND_ROWS // kind.block_bytes
    bands = bands.reshape(count, blocks, BAND_ROWS * kind.block_bytes)
    rows = np.empty((count, BAND_ROWS, blocks, kind.block_bytes), np.uint8)
    for start, stop, size in _runs(kind):
        pieces = bands[..., BAND_ROWS * start : BAND_ROWS * stop]
        pieces = pieces.reshape(count, blocks, (stop - start) // size, BAND_ROWS, size)
        rows[..., start:stop] = pieces.transpose(0, 3, 1, 2, 4).reshape(*rows.shape[:3], stop - start)
    return rows.reshape(count * BAND_ROWS, blocks * kind.block_bytes)


def _runs(kind: WeightType) -> Iterator[tuple[int, int, int]]:
    """Cuts a block into runs of pieces of one size: (first byte, end, size of a piece)."""
    start = 0
    for half in (*kind.halves, kind.block_bytes):
        if start < half:
            yield start, half, 4
        if half < kind.block_bytes:
            yield half, half + 2, 2
        start = half + 2
