"""The angles of rotary position embedding, for every published scaling (they are divisors in `RopeSpec`).

Knows frequencies and positions. The turning itself is a part of attention (`ComputeHome.attention`).
"""

from __future__ import annotations

import numpy as np

from shoal.kernels.arrays import Ids
from shoal.kernels.attention_operands import Rotation
from shoal.partition.spec import RopeSpec


class Rope:
    """Inverse frequencies of one `RopeSpec` for texts of `tokens` tokens."""

    def __init__(self, spec: RopeSpec, tokens: int) -> None:
        theta, divisors, self._magnitude = spec.turning(tokens)
        exponent = np.arange(0, spec.dims, 2, dtype=np.float32) / spec.dims
        self._spec = spec
        self._inverse_frequency = (theta ** -exponent.astype(np.float64)).astype(np.float32)  # (dims/2,)
        if divisors:
            self._inverse_frequency /= np.array(divisors, np.float32)

    def at(self, positions: Ids) -> Rotation:
        """The rotation of positions (T,)."""
        angle = positions[:, None].astype(np.float32) * self._inverse_frequency  # (T, dims/2)
        # Computed in f64 and then rounded: on some machines the last bit in f32 depends on the number of rows.
        cos = np.cos(angle, dtype=np.float64).astype(np.float32)
        sin = np.sin(angle, dtype=np.float64).astype(np.float32)
        if self._magnitude != 1.0:
            cos, sin = cos * self._magnitude, sin * self._magnitude
        return Rotation(self._spec.dims, self._spec.interleaved, cos, sin)


def joined(rotations: list[Rotation]) -> Rotation:
    """The rotation of all their rows, in this order; they have the same dimensions."""
    first = rotations[0]
    if len(rotations) == 1:
        return first
    cos = np.concatenate([rotation.cos for rotation in rotations])
    sin = np.concatenate([rotation.sin for rotation in rotations])
    return Rotation(first.dims, first.interleaved, cos, sin)
