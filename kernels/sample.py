"""Random weights in any stored type, for measurements and tests.

Random bytes become finite weights by what `WeightType` says of a block's float fields. The values mean
nothing: speed and agreement are what such matrices are for.
"""

import torch
from torch import Tensor

from shoal.kernels.dispatch import from_stored
from shoal.kernels.matrix import Matrix
from shoal.kernels.types import BF16, F16, F32, WeightType

_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


def random_rows(kind: WeightType, rows: int, cols: int, seed: int = 0, scale: float = 0.01) -> Tensor:
    """rows×cols of random weights as files hold them, uint8 (rows, row bytes): those of float types of deviation
    `scale`, in others with block scales (of either sign) of that deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = _DTYPES.get(kind)
    if dtype is not None:
        weights = torch.randn(rows, cols, generator=generator) * scale
        return weights.to(dtype).view(torch.uint8)
    stored = torch.randint(0, 256, (rows, kind.row_bytes(cols)), generator=generator, dtype=torch.uint8)
    blocks = stored.view(-1, kind.block_bytes)
    for at in kind.halves:
        scales = torch.randn(blocks.shape[0], 1, generator=generator) * scale
        blocks[:, at : at + 2] = scales.half().view(torch.uint8)
    return stored


def random_matrix(
    kind: WeightType, rows: int, cols: int, seed: int = 0, scale: float = 0.01, offset_bytes: int = 0
) -> Matrix:
    """The same as a matrix, whose bytes start `offset_bytes` off alignment."""
    memory = torch.empty(offset_bytes + kind.matrix_bytes(rows, cols), dtype=torch.uint8)[offset_bytes:]
    return from_stored(kind, rows, cols, random_rows(kind, rows, cols, seed, scale), memory)
