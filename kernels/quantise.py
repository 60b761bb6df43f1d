"""Float weights into quantised types, as files hold them: Q8_0, Q6_K and Q4_0.

Scales are searched: of a few scales around that of the largest weight the one is taken whose best multiple leaves the
least squared error (the idea of ggml's `make_qx_quants`). In plain torch, over tiles that stay in the cache. Does not
know which weights deserve which type.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.kernels.errors import OperandError
from shoal.kernels.types import Q4_0, Q6_K, Q8_0, WeightType

_TILE_WEIGHTS = 1 << 16
_STRETCHES = (1.0, 0.92, 1.08)


def quantise(kind: WeightType, values: Tensor) -> Tensor:
    """Rows float32 (n, cols) as rows of `kind`, uint8 (n, row bytes). OperandError for other types than Q8_0, Q6_K and
    Q4_0, for rows that are not whole blocks, and for weights that no scale in half precision can stand for.
    """
    rows, cols = values.shape
    row_bytes = kind.row_bytes(cols)
    encode = _ENCODERS.get(kind.name)
    if encode is None or values.dtype is not torch.float32:
        known = ", ".join(_ENCODERS)
        raise OperandError(f"cannot store {values.dtype} as {kind.name}: only float32, as one of {known}")
    if not all(end.isfinite() for end in values.aminmax()):
        raise OperandError("a weight that is infinite or not a number cannot be quantised")
    blocks = values.reshape(-1, kind.block_weights)
    stored = torch.empty(len(blocks), kind.block_bytes, dtype=torch.uint8)
    step = _TILE_WEIGHTS // kind.block_weights
    for start in range(0, len(blocks), step):
        encode(blocks[start : start + step], stored[start : start + step])
    return stored.view(rows, row_bytes)


def _q8_0(x: Tensor, out: Tensor) -> None:
    scale = _half(x.abs().amax(-1, keepdim=True) / 127)
    _put_half(out[:, :2], scale)
    out[:, 2:] = _nearest(x, scale, -127, 127).view(torch.uint8)


def _q4_0(x: Tensor, out: Tensor) -> None:
    scale = _half(_best_scale(x, 8))
    _put_half(out[:, :2], scale)
    q = (_nearest(x, scale, -8, 7) + 8).view(torch.uint8)  # (N, 32)
    out[:, 2:] = q[:, :16] | (q[:, 16:] << 4)


def _q6_k(x: Tensor, out: Tensor) -> None:
    groups = x.view(-1, 16, 16)
    wanted = _best_scale(groups, 32).squeeze(-1)  # (N, 16)
    whole = _half(_largest(wanted) / -128)  # (N, 1)
    scales = _nearest(wanted, whole, -128, 127)  # (N, 16)
    q = (_nearest(groups, (whole * scales).unsqueeze(-1), -32, 31) + 32).view(torch.uint8)
    low, high = (q & 15).view(-1, 2, 2, 64), (q >> 4).view(-1, 2, 4, 32)
    out[:, :128] = (low[:, :, 0] | (low[:, :, 1] << 4)).flatten(1)
    out[:, 128:192] = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).flatten(
        1
    )
    out[:, 192:208] = scales.view(torch.uint8)
    _put_half(out[:, 208:210], whole)


def _best_scale(x: Tensor, steps: int) -> Tensor:
    """The scale for whole numbers from -steps to steps - 1 that leaves the least squared error; (…, n) → (…, 1)"""
    full = -steps / _largest(x)  # its inverse: the largest weight becomes -steps
    full = torch.where(full.isfinite(), full, 0.0)
    best, scale = torch.full_like(full, -1.0), torch.zeros_like(full)
    for stretch in _STRETCHES:
        q = (x * (full * stretch)).round_().clamp_(-steps, steps - 1)
        fit = (x * q).sum(-1, keepdim=True)
        size = q.square_().sum(-1, keepdim=True)
        gain = torch.where(
            size > 0, fit * fit / size, 0.0
        )  # of the squares of x, what `fit / size` times q takes away
        scale = torch.where(gain > best, fit / size, scale)
        best = torch.maximum(best, gain)
    return torch.where(best > 0, scale, 0.0)


def _largest(x: Tensor) -> Tensor:
    """Of each group the number of the largest magnitude, with its sign; (…, n) → (…, 1)"""
    most, least = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    return torch.where(most >= -least, most, least)


def _nearest(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """x in whole multiples of `scale`, int8."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (x * inverse).round_().clamp_(low, high).to(torch.int8)


def _half(scale: Tensor) -> Tensor:
    """`scale` as half precision holds it."""
    rounded = scale.half().float()
    if not rounded.isfinite().all():
        raise OperandError("a weight that is beyond 65504 steps cannot be quantised")
    return rounded


def _put_half(out: Tensor, scale: Tensor) -> None:
    out.copy_(scale.half().view(torch.uint8))


_ENCODERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    Q8_0.name: _q8_0,
    Q6_K.name: _q6_k,
    Q4_0.name: _q4_0,
}
