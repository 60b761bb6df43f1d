"""From rows of weights as files hold them to a matrix in memory, and from there to numbers.

What is in memory is the same for all kernels of the CPU, so whoever reads, packs or stores weights need not know a
home. Checks operands; the kernels of this process move and decode the bytes.
"""

import numpy as np

from shoal.kernels.arrays import Bytes, Floats, Ids
from shoal.kernels.errors import OperandError
from shoal.kernels.homes import cpu
from shoal.kernels.matrix import Matrix
from shoal.kernels.types import WeightType


def from_stored(
    kind: WeightType, rows: int, cols: int, stored: Bytes | bytes | memoryview, into: Bytes | None = None
) -> Matrix:
    """A matrix made from rows as files hold them: a contiguous uint8 array of any shape, bytes or a memoryview.

    The matrix is written to `into` (uint8, `kind.matrix_bytes`). Without it a float type wraps `stored`, which it
    holds as it is, and a quantised type takes new memory. OperandError unless `stored` has exactly the size of
    rows×cols.
    """
    data = stored if isinstance(stored, np.ndarray) else np.frombuffer(stored, np.uint8)
    row_bytes = kind.row_bytes(cols)
    if data.dtype != np.uint8 or not data.flags.c_contiguous or data.size != max(rows, 0) * row_bytes:
        raise OperandError(
            f"{rows}×{cols} {kind.name} takes {max(rows, 0) * row_bytes} contiguous uint8, "
            f"got {data.size} of {data.dtype}; the file may be cut short or mislabelled"
        )
    if into is None:
        if not kind.quantised:
            return Matrix(kind, data.reshape(-1), rows, cols)
        into = np.empty(kind.matrix_bytes(rows, cols), np.uint8)
    matrix = Matrix(kind, into, rows, cols)
    interleave(kind, data.reshape(rows, row_bytes), matrix.data)
    return matrix


def interleave(kind: WeightType, stored: Bytes, into: Bytes) -> None:
    """Writes rows as files hold them, contiguous uint8 (n, row bytes), to the memory of a matrix or of some of its
    bands, contiguous uint8 (bytes,). A last band that is not full is filled up with zeros.
    """
    rows, row_bytes = stored.shape
    cols = row_bytes // kind.block_bytes * kind.block_weights
    if into.shape != (kind.matrix_bytes(rows, cols),):
        raise OperandError(f"{rows}×{cols} {kind.name} do not fill memory of {into.size} bytes")
    if not stored.flags.c_contiguous or not into.flags.carray:
        raise OperandError(
            "rows as stored and a matrix must each lie together, and a matrix be writable while filled"
        )
    cpu().interleave(kind, stored, into)


def gather_rows(w: Matrix, ids: Ids) -> Floats:
    """Rows `ids` (int64 (T,)) of w as float32 (T, cols); OperandError if there is no such row."""
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise OperandError(f"row ids must be int64 of shape (T,), got {ids.dtype} {ids.shape}")
    return cpu().gather_rows(w, ids)


def dequantize(w: Matrix) -> Floats:
    """All weights as float32 (rows, cols). This is a full-size copy, so it is for small matrices and tests."""
    return cpu().dequantize(w)
