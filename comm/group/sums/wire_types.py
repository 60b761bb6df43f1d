"""Numbers on their way: what f32 rows become on the wire, and back.

    f32    4 bytes a number, exact
    bf16   2 bytes, rounded to nearest, ties to even: relative error ≤ 2**-8 of each number (infinities and NaN stay)
    int8   1 byte and a scale for each 32 numbers of a row: error ≤ 1/254 of the largest of these, or 2**-119. If one of
           them is NaN or infinite, all become NaN

Pure. Both sides know the shape from the plan, so nothing on the wire says how long it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

F32Rows = npt.NDArray[np.float32]
Octets = npt.NDArray[np.uint8]
WireType = Literal["f32", "bf16", "int8"]

INT8_GROUP = 32
PIECE_NUMBERS = 1 << 14
_NORMAL = np.finfo(np.float32).tiny  # what is smaller has fewer bits, so a scale could be far too small


def wire_bytes(kind: WireType, shape: tuple[int, int]) -> int:
    """Octets of rows of this shape on the wire."""
    rows, columns = shape
    if kind == "f32":
        return 4 * rows * columns
    if kind == "bf16":
        return 2 * rows * columns
    return rows * (columns + 4 * -(-columns // INT8_GROUP))


def encode(kind: WireType, values: F32Rows, into: Octets) -> None:
    """Writes values (T, n) to `into`, (wire_bytes,)."""
    if kind == "f32":
        into.view(np.float32).reshape(values.shape)[...] = values
    elif kind == "bf16":
        _to_bf16(values, into)
    else:
        _to_int8(values, into)


def decode(kind: WireType, data: Octets, into: F32Rows) -> None:
    """Writes what `encode` wrote, (wire_bytes,), to `into` (T, n)."""
    if kind == "f32":
        into[...] = data.view(np.float32).reshape(into.shape)
    elif kind == "bf16":
        for rows in _pieces(into.shape):
            bits = into[rows].view(np.uint32)
            bits[...] = data.view(np.uint16).reshape(into.shape)[rows]
            bits <<= 16
    else:
        _from_int8(data, into)


def _pieces(shape: tuple[int, int]) -> Iterator[slice]:
    """Rows of an array (T, n), so many together that what is computed from them stays in the processor's cache."""
    rows, columns = shape
    step = max(1, PIECE_NUMBERS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _to_bf16(values: F32Rows, into: Octets) -> None:
    wire = into.view(np.uint16).reshape(values.shape)
    for rows in _pieces(values.shape):
        piece = np.ascontiguousarray(values[rows])
        bits = piece.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += bits
        rounded += 0x7FFF
        rounded >>= 16
        wire[rows] = rounded
        if piece.size and np.isnan(piece.max()):  # of which rounding could make an infinity
            nan = np.isnan(piece)
            wire[rows][nan] = (bits[nan] >> 16) | 0x40


@np.errstate(invalid="ignore")  # some NaN signal
def _to_int8(values: F32Rows, into: Octets) -> None:
    columns = values.shape[1]
    groups = -(-columns // INT8_GROUP)
    scales, numbers = _int8_parts(into, *values.shape)
    for rows in _pieces(values.shape):
        padded = np.zeros((rows.stop - rows.start, groups * INT8_GROUP), np.float32)
        padded[:, :columns] = values[rows]
        grouped = padded.reshape(-1, INT8_GROUP)
        largest = np.maximum.reduceat(np.abs(padded).reshape(-1), np.arange(0, padded.size, INT8_GROUP))
        scale = largest / np.float32(127)
        scale[scale < _NORMAL] = 0
        broken = ~np.isfinite(scale)
        if broken.any():
            scale[broken] = np.nan
            grouped[broken] = 0
        scales[rows] = scale.reshape(-1, groups)
        scale[~(scale > 0)] = 1
        grouped /= scale[:, None]
        np.rint(padded, out=padded)
        numbers[rows] = padded[:, :columns]


def _from_int8(data: Octets, into: F32Rows) -> None:
    rows, columns = into.shape
    scales, numbers = _int8_parts(data, rows, columns)
    into[...] = numbers
    into *= np.repeat(scales, INT8_GROUP, axis=1)[:, :columns]


def _int8_parts(data: Octets, rows: int, columns: int) -> tuple[F32Rows, npt.NDArray[Any]]:
    """Views of the scales (T, groups) and the numbers (T, n)."""
    groups = -(-columns // INT8_GROUP)
    end = 4 * rows * groups
    scales: F32Rows = data[:end].view(np.float32).reshape(rows, groups)
    return scales, data[end:].view(np.int8).reshape(rows, columns)
