"""The kernels in plain torch: they define the truth and serve where nothing faster was built.

Knows what the bytes of every weight type mean (`decode`) and the arithmetic of every kernel, in
float32; quantised weights meet inputs rounded to bytes (`quantised_inputs`). Does not know how to be
fast, and unlike `native` does not promise that a row's result is bitwise the same whatever is computed
beside it: torch picks its matmul by shape.

Layouts of the types: ggml's block definitions, as documented by `gguf.quants`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from shoal.kernels.errors import OperandError
from shoal.kernels.matrix import Matrix
from shoal.kernels.types import WeightType

TILE_BYTES = 4 << 20
"""Most bytes of float32 weights that exist at once."""

SMALLEST_INPUT = 1e-30
"""A group of inputs to a quantised linear counts as zeros if no magnitude in it reaches this."""

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _tile_rows(cols: int) -> int:
    return max(1, TILE_BYTES // (4 * max(cols, 1)))


def dequantize(w: Matrix) -> Tensor:
    """The weights as float32 (rows, cols). A full-size copy: for tests, norms and small tables."""
    out = torch.empty(w.rows, w.cols)
    step = _tile_rows(w.cols)
    for start in range(0, w.rows, step):
        out[start : start + step] = decode(w.type, w.data[start : start + step])
    return out


def linear(x: Tensor, w: Matrix, bias: Tensor | None = None) -> Tensor:
    """x (T, cols) @ w.T + bias (rows,), float32 (T, rows); weights expand tile by tile.

    Of inputs to quantised weights the multiplication sees `quantised_inputs`.
    """
    if w.type.block_weights > 1:
        x = quantised_inputs(x, w.type.block_weights)
    out = torch.empty(x.shape[0], w.rows)
    step = _tile_rows(w.cols)
    for start in range(0, w.rows, step):
        tile = decode(w.type, w.data[start : start + step])
        out[:, start : start + step] = x @ tile.T
    return out if bias is None else out.add_(bias)


def quantised_inputs(x: Tensor, group: int) -> Tensor:
    """x (T, cols) as bytes would hold it, float32: each `group` columns are whole multiples, -127 to 127, of 1/127
    of their largest magnitude, rounded half to even.

    A group with an infinite or NaN input becomes NaN. These are llama.cpp's groups, one for each block of
    weights, so that both lose the same to rounding; native kernels multiply the whole numbers exactly.
    """
    groups = x.reshape(x.shape[0], x.shape[1] // group, group)  # (T, cols / group, group)
    largest = groups.abs().amax(-1, keepdim=True)
    most = torch.full_like(largest, 127)  # a tensor: torch may divide by a plain number less exactly
    scale = (
        (largest / most).masked_fill(largest < SMALLEST_INPUT, 0).masked_fill(~largest.isfinite(), torch.nan)
    )
    inverse = (most / largest).masked_fill(largest < SMALLEST_INPUT, 0)
    return ((groups * inverse).round() * scale).reshape(x.shape)


def gather_rows(w: Matrix, ids: Tensor) -> Tensor:
    """Rows `ids` (int64 (T,)) as float32 (T, cols); only those rows are decoded."""
    if ids.numel():
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= w.rows:
            raise OperandError(f"row ids must be within [0, {w.rows}), got {low} to {high}")
    return decode(w.type, w.data[ids])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, d) / rms(x) * weight (d,), each row by itself."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, elementwise, with the tanh form of gelu."""
    return gelu(gate, approximate="tanh") * up


def decode(kind: WeightType, data: Tensor) -> Tensor:
    """Rows of stored bytes, uint8 (n, row bytes), as float32 (n, cols)."""
    rows, row_bytes = data.shape
    blocks = data.reshape(-1, kind.block_bytes)  # (N, block bytes)
    cols = row_bytes // kind.block_bytes * kind.block_weights
    return _DECODERS[kind.name](blocks).reshape(rows, cols)


def _floats(field: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (N, k) as float32 (N, k / itemsize). The clone makes them aligned, which torch needs."""
    return field.clone(memory_format=torch.contiguous_format).view(dtype).float()


def _half(field: Tensor) -> Tensor:
    return _floats(field, torch.float16)


def _bits(field: Tensor, shifts: tuple[int, ...], mask: int, group: int) -> Tensor:
    """Bit fields of bytes (N, k): every run of `group` bytes is read once per shift; (N, k * shifts)."""
    n, k = field.shape
    runs = field.reshape(n, k // group, 1, group)  # (N, k / group, 1, group)
    shift = torch.tensor(shifts, dtype=torch.uint8).view(-1, 1)
    return ((runs >> shift) & mask).reshape(n, k * len(shifts))


def _fifth_bits(field: Tensor) -> Tensor:
    """Q5's 32 high bits, 4 bytes (N, 4), one bit per weight in order, as 0 or 16; (N, 32)."""
    return _bits(field, tuple(range(8)), 1, 1) << 4


def _nibbles(field: Tensor) -> Tensor:
    """16 bytes (N, 16): the low halves are weights 0..16, the high halves 16..32; (N, 32)."""
    return _bits(field, (0, 4), 15, 16)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * _nibbles(b[:, 4:]).float() + _half(b[:, 2:4])


def _q5_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])
    return _half(b[:, :2]) * q.float() + _half(b[:, 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * b[:, 2:].view(torch.int8).float()


def _iq4_nl(b: Tensor) -> Tensor:
    values = torch.tensor(IQ4_NL_VALUES, dtype=torch.float32)
    return _half(b[:, :2]) * values[_nibbles(b[:, 2:]).long()]


def _q2_k(b: Tensor) -> Tensor:
    scales, qs, d, dmin = b[:, :16], b[:, 16:80], _half(b[:, 80:82]), _half(b[:, 82:84])
    scale = (d * (scales & 15).float()).unsqueeze(-1)  # (N, 16, 1)
    low = (dmin * (scales >> 4).float()).unsqueeze(-1)
    q = _bits(qs, (0, 2, 4, 6), 3, 32).float().view(-1, 16, 16)
    return scale * q - low


def _q3_k(b: Tensor) -> Tensor:
    hmask, qs, packed, d = b[:, :32], b[:, 32:96], b[:, 96:108], _half(b[:, 108:110])
    six = _bits(packed[:, :8], (0, 4), 15, 8) | (_bits(packed[:, 8:], (0, 2, 4, 6), 3, 4) << 4)
    scale = (d * (six.float() - 32)).unsqueeze(-1)  # (N, 16, 1)
    q = _bits(qs, (0, 2, 4, 6), 3, 32) | (_bits(hmask, tuple(range(8)), 1, 32) << 2)
    return scale * (q.float() - 4).view(-1, 16, 16)


def _six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of Q4_K and Q5_K from their 12 bytes (N, 12); each float32 (N, 8, 1)."""
    a, m, top = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat((a & 63, (top & 15) | ((a >> 2) & 48)), dim=1)
    low = torch.cat((m & 63, (top >> 4) | ((m >> 2) & 48)), dim=1)
    return scale.float().unsqueeze(-1), low.float().unsqueeze(-1)


def _q4_k(b: Tensor) -> Tensor:
    scale, low = _six_bit_pairs(b[:, 4:16])
    d, dmin = _half(b[:, :2]).unsqueeze(-1), _half(b[:, 2:4]).unsqueeze(-1)
    q = _bits(b[:, 16:], (0, 4), 15, 32).float().view(-1, 8, 32)
    return d * scale * q - dmin * low


def _q5_k(b: Tensor) -> Tensor:
    scale, low = _six_bit_pairs(b[:, 4:16])
    d, dmin = _half(b[:, :2]).unsqueeze(-1), _half(b[:, 2:4]).unsqueeze(-1)
    q = _bits(b[:, 48:], (0, 4), 15, 32) | (_bits(b[:, 16:48], tuple(range(8)), 1, 32) << 4)
    return d * scale * q.float().view(-1, 8, 32) - dmin * low


def _q6_k(b: Tensor) -> Tensor:
    ql, qh, scales, d = b[:, :128], b[:, 128:192], b[:, 192:208], _half(b[:, 208:210])
    scale = (d * scales.view(torch.int8).float()).unsqueeze(-1)  # (N, 16, 1)
    q = _bits(ql, (0, 4), 15, 64) | (_bits(qh, (0, 2, 4, 6), 3, 32) << 4)
    return scale * (q.float() - 32).view(-1, 16, 16)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda b: _floats(b, torch.float32),
    "F16": _half,
    "BF16": lambda b: _floats(b, torch.bfloat16),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
}
