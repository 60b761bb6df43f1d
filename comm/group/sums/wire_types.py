"""Numbers on their way: what f32 rows become on the wire, and back.

    f32    4 bytes a number, exact
    bf16   2 bytes, rounded to nearest, ties to even: relative error ≤ 2**-8 of each number (infinities and NaN stay)
    int8   1 byte and a scale for each 32 numbers of a row: error ≤ 1/254 of the largest of these

Pure. Both sides know the shape from the plan, so nothing on the wire says how long it is.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

F32Rows = npt.NDArray[np.float32]
Octets = npt.NDArray[np.uint8]
WireType = Literal["f32", "bf16", "int8"]

INT8_GROUP = 32


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
        wide = data.view(np.uint16).astype(np.uint32) << 16
        into[...] = wide.view(np.float32).reshape(into.shape)
    else:
        _from_int8(data, into)


def _to_bf16(values: F32Rows, into: Octets) -> None:
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(-1)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000  # rounding could make an infinity of it
    into.view(np.uint16)[...] = np.where(nan, (bits >> 16) | 0x40, rounded)


@np.errstate(invalid="ignore", over="ignore")  # NaN and infinities travel as a NaN scale
def _to_int8(values: F32Rows, into: Octets) -> None:
    rows, columns = values.shape
    groups = -(-columns // INT8_GROUP)
    padded = np.zeros((rows, groups * INT8_GROUP), np.float32)
    padded[:, :columns] = values
    grouped = padded.reshape(rows, groups, INT8_GROUP)
    scales = (np.abs(grouped).max(axis=2) / 127).astype(np.float32)
    scales[~np.isfinite(scales)] = np.nan
    per = np.where(scales > 0, scales, 1)[:, :, None]
    whole = np.rint(np.nan_to_num(grouped / per, nan=0.0, posinf=0.0, neginf=0.0)).astype(np.int8)
    scale_bytes, numbers = _int8_parts(into, rows, columns)
    scale_bytes[...] = scales
    numbers[...] = whole.reshape(rows, -1)[:, :columns]


def _from_int8(data: Octets, into: F32Rows) -> None:
    rows, columns = into.shape
    scales, numbers = _int8_parts(data, rows, columns)
    into[...] = numbers
    into *= np.repeat(scales, INT8_GROUP, axis=1)[:, :columns]


def _int8_parts(data: Octets, rows: int, columns: int) -> tuple[F32Rows, npt.NDArray[Any]]:
    """Views of the scales (T, groups) and the numbers (T, n)."""
    end = 4 * rows * -(-columns // INT8_GROUP)
    scales: F32Rows = data[:end].view(np.float32).reshape(rows, -1)
    return scales, data[end:].view(np.int8).reshape(rows, columns)
