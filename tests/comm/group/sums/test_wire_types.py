"""Numbers become the same on the wire as by the plain formulas, whatever they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.group.sums.wire_types import PIECE_NUMBERS, WireType, decode, encode, wire_bytes

Rows = npt.NDArray[np.float32]


def plain_bf16(values: Rows) -> Rows:
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    wire = np.where(nan, (bits >> 16) | 0x40, rounded)
    return (wire << 16).astype(np.uint32).view(np.float32)


@np.errstate(all="ignore")
def plain_int8(values: Rows) -> Rows:
    rows, columns = values.shape
    padded = np.zeros((rows, -(-columns // 32) * 32), np.float32)
    padded[:, :columns] = values
    grouped = padded.reshape(rows, -1, 32)
    scales = (np.abs(grouped).max(axis=2) / 127).astype(np.float32)
    scales[~np.isfinite(scales)] = np.nan
    scales[scales < np.finfo(np.float32).tiny] = 0
    per = np.where(scales > 0, scales, 1)[:, :, None]
    whole = np.rint(np.nan_to_num(grouped / per, nan=0.0, posinf=0.0, neginf=0.0)).astype(np.int8)
    found: Rows = (whole * scales[:, :, None]).reshape(rows, -1)[:, :columns].astype(np.float32)
    return found


PLAIN: dict[WireType, Any] = {"bf16": plain_bf16, "int8": plain_int8}


def back(kind: WireType, values: Rows) -> Rows:
    data = np.empty(wire_bytes(kind, values.shape), np.uint8)
    encode(kind, values, data)
    found = np.empty(values.shape, np.float32)
    decode(kind, data, found)
    return found


@pytest.mark.parametrize("kind", PLAIN)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 100),
    bits=st.sampled_from([0xFFFFFFFF, 0x7FFF, 0xBFFFFFFF, 0x807FFFFF, 0x7F800000, 0xFF80FFFF]),
    seed=st.integers(0, 1 << 30),
)
def test_all_numbers_are_as_by_the_plain_formula(
    kind: WireType, rows: int, columns: int, bits: int, seed: int
) -> None:
    """Of any 32 bits, or of such as are small, large, or infinities and NaN."""
    drawn = np.random.default_rng(seed).integers(0, 1 << 32, (rows, columns), np.uint64).astype(np.uint32)
    values = (drawn & np.uint32(bits)).view(np.float32)
    np.testing.assert_array_equal(back(kind, values), PLAIN[kind](values))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("shape", [(3, PIECE_NUMBERS // 2 - 7), (2, 2 * PIECE_NUMBERS), (700, 96)])
def test_long_rows_and_many_rows(kind: WireType, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(back(kind, values), PLAIN[kind](values))
    backwards = values[::-1, ::-1]
    np.testing.assert_array_equal(back(kind, backwards), PLAIN[kind](np.ascontiguousarray(backwards)))
