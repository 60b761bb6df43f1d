"""Weights to multiply by, as they lie in models: more than caches hold, in huge pages. Knows one type, which no kernel
computes with for longer than it is read.
"""

from __future__ import annotations

import numpy as np

from shoal.kernels import WEIGHT_TYPES, Linears, Matrix
from shoal.kernels.huge_pages import mapped
from shoal.partition.memory_layout import BAND_ROWS

KIND = next(kind for kind in WEIGHT_TYPES if kind.name == "Q8_0")
COLUMNS = 4096
FEW_COLUMNS = 32


def weights(nbytes: int, matrix_bytes: int) -> list[Linears]:
    """So many bytes of matrices with COLUMNS columns, each of about `matrix_bytes`."""
    memory = mapped(nbytes)
    memory[:] = 0x11  # a number in every type; each page has to be there
    rows = matrix_bytes // KIND.matrix_bytes(BAND_ROWS, COLUMNS) * BAND_ROWS
    used = KIND.matrix_bytes(rows, COLUMNS)
    starts = range(0, len(memory) - matrix_bytes + 1, matrix_bytes)
    return [Linears((Matrix(KIND, memory[at : at + used], rows, COLUMNS),)) for at in starts]


def few_weights() -> Linears:
    """Next to nothing to multiply by."""
    nbytes = KIND.matrix_bytes(BAND_ROWS, FEW_COLUMNS)
    return Linears((Matrix(KIND, np.full(nbytes, 0x11, np.uint8), BAND_ROWS, FEW_COLUMNS),))
