"""Random weights in any stored type, for measurements and tests.

Knows where a block keeps its float fields, so that random bytes become finite weights. The values
mean nothing: speed and agreement are what such matrices are for.
"""

import torch

from shoal.kernels.matrix import Matrix
from shoal.kernels.types import BF16, F16, F32, WeightType

_SCALES_AT = {  # byte offsets of the float16 scales in a block
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
}
_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


def random_matrix(
    kind: WeightType, rows: int, cols: int, seed: int = 0, scale: float = 0.01, offset_bytes: int = 0
) -> Matrix:
    """rows×cols of random weights, those of float types of deviation `scale`, in others with block
    scales (of either sign) of that deviation; the bytes start `offset_bytes` off alignment.
    """
    generator = torch.Generator().manual_seed(seed)
    row_bytes = kind.row_bytes(cols)
    buffer = torch.empty(offset_bytes + rows * row_bytes, dtype=torch.uint8)
    stored = buffer[offset_bytes:]
    dtype = _DTYPES.get(kind)
    if dtype is not None:
        weights = torch.randn(rows * cols, generator=generator) * scale
        stored.copy_(weights.to(dtype).view(torch.uint8))
    else:
        torch.randint(0, 256, stored.shape, generator=generator, dtype=torch.uint8, out=stored)
        blocks = stored.view(-1, kind.block_bytes)
        for at in _SCALES_AT[kind.name]:
            scales = torch.randn(blocks.shape[0], 1, generator=generator) * scale
            blocks[:, at : at + 2] = scales.half().view(torch.uint8)
    return Matrix.from_bytes(kind, rows, cols, stored)
