"""Random weights in any stored type, for measurements and tests.

Random bytes become finite weights by what `WeightType` says of a block's float fields. The values mean
nothing: speed and agreement are what such matrices are for.
"""

import numpy as np

from shoal.kernels import from_stored
from shoal.kernels.arrays import Bytes
from shoal.kernels.matrix import Matrix
from shoal.kernels.types import BF16, F16, F32, WeightType


def random_rows(kind: WeightType, rows: int, cols: int, seed: int = 0, scale: float = 0.01) -> Bytes:
    """rows×cols of random weights as files hold them, uint8 (rows, row bytes): those of float types have deviation
    `scale`, in others with block scales (of either sign) of that deviation.
    """
    generator = np.random.default_rng(seed)
    if not kind.quantised:
        weights = generator.standard_normal((rows, cols), np.float32) * np.float32(scale)
        if kind is F16:
            return weights.astype(np.float16).view(np.uint8)
        stored = weights.view(np.uint8)
        if kind is BF16:  # the upper half of float32
            return np.ascontiguousarray(stored.reshape(rows, cols, 4)[..., 2:]).reshape(rows, 2 * cols)
        assert kind is F32, kind
        return stored
    stored = generator.integers(0, 256, (rows, kind.row_bytes(cols)), np.uint8)
    blocks = stored.reshape(-1, kind.block_bytes)
    for at in kind.halves:
        scales = generator.standard_normal((len(blocks), 1), np.float32) * np.float32(scale)
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8)
    return stored


def random_matrix(
    kind: WeightType, rows: int, cols: int, seed: int = 0, scale: float = 0.01, offset_bytes: int = 0
) -> Matrix:
    """The same as a matrix, whose bytes start `offset_bytes` off alignment."""
    memory = np.empty(offset_bytes + kind.matrix_bytes(rows, cols), np.uint8)[offset_bytes:]
    return from_stored(kind, rows, cols, random_rows(kind, rows, cols, seed, scale), memory)
