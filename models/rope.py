"""Rotary position embedding, for every published scaling (they are divisors in `RopeSpec`).

Source: RoFormer, arXiv 2104.09864. Rotating the pair (a, b) by an angle is [a, b]*cos + [-b, a]*sin; with the
pairs on an axis of their own, [-b, a] is a flip along it whose sign is kept in the sine table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.partition.spec import RopeSpec


class Rotation:
    """cos and signed sin for the positions of one step, shaped for one `RopeSpec`."""

    def __init__(
        self, spec: RopeSpec, inverse_frequency: Tensor, magnitude: float, positions: Tensor
    ) -> None:
        angle = positions[:, None].to(torch.float32) * inverse_frequency  # (T, dims/2)
        cos, sin = angle.cos(), angle.sin()
        if magnitude != 1.0:
            cos, sin = cos * magnitude, sin * magnitude
        self.dims = spec.dims
        self.axis = -1 if spec.interleaved else -2
        self.cos = torch.stack((cos, cos), self.axis).unsqueeze(1)  # (T, 1, 2, dims/2) or (T, 1, dims/2, 2)
        self.sin = torch.stack((-sin, sin), self.axis).unsqueeze(1)

    def __call__(self, x: Tensor) -> Tensor:
        """(T, heads, head_dim) → the same, its first `dims` dimensions turned."""
        rotated, rest = (x, None) if x.shape[-1] == self.dims else (x[..., : self.dims], x[..., self.dims :])
        pairs = rotated.reshape(*x.shape[:2], *self.cos.shape[2:])
        turned = torch.addcmul(pairs * self.cos, pairs.flip(self.axis), self.sin).flatten(2)
        return turned if rest is None else torch.cat((turned, rest), -1)


class Rope:
    """Inverse frequencies of one `RopeSpec` in a session of `context_tokens`."""

    def __init__(self, spec: RopeSpec, context_tokens: int) -> None:
        divisors, self._magnitude = spec.for_context(context_tokens)
        exponent = torch.arange(0, spec.dims, 2, dtype=torch.float32) / spec.dims
        self._spec = spec
        self._inverse_frequency = 1.0 / (spec.theta**exponent)  # (dims/2,)
        if divisors:
            self._inverse_frequency /= torch.tensor(divisors, dtype=torch.float32)

    def at(self, positions: Tensor) -> Rotation:
        """The rotation of positions (T,)."""
        return Rotation(self._spec, self._inverse_frequency, self._magnitude, positions)
