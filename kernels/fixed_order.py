"""Sums that have the same bits on every machine, in NumPy: what `native/strands.h` computes.

Norms and the scores of routers decide which experts a token gets, and ranks of a group decide that each by itself. So
there are sixteen running sums over ascending columns, products are rounded before they are added, and the sums are
folded in one order.
"""

import numpy as np

from shoal.kernels.arrays import Floats

STRANDS = 16


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / rms(x) * weight, row by row: x (T, n), weight (n,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = _summed(x * x) / np.float32(x.shape[1])
        scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
        normed: Floats = x * scale[:, None] * weight
    return normed


def scores(x: Floats, weights: Floats, bias: Floats | None = None) -> Floats:
    """x (T, n) @ weights (rows, n).T + bias, (T, rows)."""
    found = np.empty((len(x), len(weights)), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for row, into in zip(x, found, strict=True):
            into[:] = _summed(weights * row)
        return found if bias is None else found + bias


def _summed(products: Floats) -> Floats:
    """The sum of each row, f32 (n, columns) → (n,)."""
    rows, columns = products.shape
    count = 1 + -(-columns // STRANDS)  # of lines: the first has the zeros that sums begin with
    lines = np.zeros((rows, count * STRANDS), np.float32)
    lines[:, STRANDS : STRANDS + columns] = products
    strands = np.add.accumulate(lines.reshape(rows, count, STRANDS), axis=1)[:, -1]
    while strands.shape[1] > 1:
        half = strands.shape[1] // 2
        strands = strands[:, :half] + strands[:, half:]
    sums: Floats = strands[:, 0]
    return sums
