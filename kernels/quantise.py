"""Float weights into quantised types, as files hold them: Q8_0 and Q4_0.

The scale of a block of Q4_0 is searched: a few scales around that of the largest weight are tried, and the one that
leaves the least squared error wins (the idea of ggml's `make_qx_quants`). Works through tiles that stay in the cache.
Does not know which weights deserve which type.
"""

from collections.abc import Callable

import numpy as np

from shoal.kernels.arrays import Array, Bytes, Floats
from shoal.kernels.errors import OperandError
from shoal.kernels.types import Q4_0, Q8_0, WeightType

_TILE_WEIGHTS = 1 << 16
_STRETCHES = (1.0, 0.92, 1.08)


def quantise(kind: WeightType, values: Floats) -> Bytes:
    """Rows float32 (n, cols) as rows of `kind`, uint8 (n, row bytes). OperandError for any other type, for rows that
    are not whole blocks, and for weights that are too large for a scale in half precision.
    """
    rows, cols = values.shape
    row_bytes = kind.row_bytes(cols)
    encode = _ENCODERS.get(kind.name)
    if encode is None or values.dtype != np.float32:
        known = ", ".join(_ENCODERS)
        raise OperandError(f"cannot store {values.dtype} as {kind.name}: only float32, as one of {known}")
    if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise OperandError("a weight that is infinite or not a number cannot be quantised")
    blocks = values.reshape(-1, kind.block_weights)
    stored = np.empty((len(blocks), kind.block_bytes), np.uint8)
    step = _TILE_WEIGHTS // kind.block_weights
    for start in range(0, len(blocks), step):
        # Blocks become columns, because NumPy reduces over rows ten times as fast as within them.
        encode(np.ascontiguousarray(blocks[start : start + step].T), stored[start : start + step])
    return stored.reshape(rows, row_bytes)


def _q8_0(x: Floats, out: Bytes) -> None:
    scale = _half(np.abs(x).max(0) / np.float32(127))
    _put_half(out[:, :2], scale)
    out[:, 2:] = _nearest(x, scale, -127, 127).view(np.uint8).T


def _q4_0(x: Floats, out: Bytes) -> None:
    scale = _half(_best_scale(x, 8))
    _put_half(out[:, :2], scale)
    q = (_nearest(x, scale, -8, 7) + 8).view(np.uint8)  # (32, N)
    out[:, 2:] = (q[:16] | (q[16:] << 4)).T


@np.errstate(over="ignore")  # weights that large are refused together with their scale
def _best_scale(x: Floats, steps: int) -> Floats:
    """The scale for whole numbers from -steps to steps - 1 that leaves the least squared error; (n, N) → (N,)"""
    full = _ratio(np.float32(-steps), _largest(x))  # its inverse: the largest weight becomes -steps
    full[~np.isfinite(full)] = 0.0
    best, scale = np.full_like(full, -1.0), np.zeros_like(full)
    for stretch in _STRETCHES:
        q = x * (full * np.float32(stretch))
        np.rint(q, out=q)
        np.clip(q, -steps, steps - 1, out=q)
        fit = (x * q).sum(0)
        step = _ratio(fit, np.square(q, out=q).sum(0))
        gain = fit * step  # how much less the sum of squares of x becomes by subtracting step * q
        np.copyto(scale, step, where=gain > best)
        np.maximum(best, gain, out=best)
    scale[best <= 0] = 0.0
    return scale


def _ratio(x: Floats | np.float32, y: Floats) -> Floats:
    """x / y, 0 where y is."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.where(y == 0, np.float32(0), x / y)


def _largest(x: Floats) -> Floats:
    """The number of the largest magnitude in each block, with its sign; (n, N) → (N,)"""
    most, least = x.max(0), x.min(0)
    larger: Floats = np.where(most >= -least, most, least)
    return larger


def _nearest(x: Floats, scale: Floats, low: int, high: int) -> Array:
    """The nearest whole multiples of `scale` (N,) to x (n, N), int8."""
    q = x * _ratio(np.float32(1), scale)
    np.rint(q, out=q)
    return np.clip(q, low, high, out=q).astype(np.int8)


def _half(scale: Floats) -> Floats:
    """`scale` rounded to half precision."""
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise OperandError("a weight that is beyond 65504 steps cannot be quantised")
    return rounded


def _put_half(out: Bytes, scale: Floats) -> None:
    out[:] = scale.astype(np.float16)[:, None].view(np.uint8)


_ENCODERS: dict[str, Callable[[Floats, Bytes], None]] = {
    Q8_0.name: _q8_0,
    Q4_0.name: _q4_0,
}
