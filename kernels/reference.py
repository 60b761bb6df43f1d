"""The kernels in plain torch: they define the truth and serve where nothing faster was built.

Takes and returns arrays, and computes on tensors in the same memory. Besides this home, only devices import torch.

Knows what the bytes of every weight type mean (`decode`) and the arithmetic of every kernel. Does not know how to be
fast. Unlike `native` it does not promise that the bits of a row are the same whatever is computed beside it, because
torch picks its matmul by shape.

Layouts of the types: ggml's block definitions, as documented by `gguf.quants`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from shoal.kernels import fixed_order
from shoal.kernels.arrays import Array, Bytes, Floats, Ids
from shoal.kernels.attention_operands import KvPages, Scoring, Segments
from shoal.kernels.attention_reference import attend
from shoal.kernels.band_layout import from_bands, to_bands
from shoal.kernels.cpu_home import CpuHome, check_attention, check_experts, check_linears, check_norm
from shoal.kernels.errors import OperandError
from shoal.kernels.matrix import (
    NARROW_INPUTS,
    WIDE_INPUTS,
    Activation,
    FeedForward,
    InputBits,
    Linears,
    Matrix,
    Routes,
)
from shoal.kernels.types import WeightType
from shoal.partition.memory_layout import INPUT_GROUP

TILE_BYTES = 4 << 20
"""Most bytes of float32 weights that exist at once."""

_MOST_INPUT = {WIDE_INPUTS: 32639, NARROW_INPUTS: 127, 14: 8159}

SMALLEST_INPUT = 1e-30
"""A group of inputs to quantised weights counts as zeros if no magnitude in it reaches this."""

WORD_COLUMNS = 128
"""Of a bf16 row that share the power of two that they are rounded by, where they are (`as_words`)."""

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


# Nothing here writes to weights and inputs, which may be read-only.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)


class ReferenceHome(CpuHome):
    """Computes in float32, except that quantised weights are multiplied by `quantised_inputs`."""

    name = "reference"

    def set_threads(self, n: int) -> None:
        torch.set_num_threads(n)

    def interleave(self, kind: WeightType, stored: Bytes, into: Bytes) -> None:
        into.reshape(-1, kind.band_rows * stored.shape[1])[:] = to_bands(kind, stored)

    def gather_rows(self, w: Matrix, ids: Ids) -> Floats:
        """Decodes only the bands that the rows are in."""
        if len(ids):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= w.rows:
                raise OperandError(f"row ids must be within [0, {w.rows}), got {low} to {high}")
        height = w.type.band_rows
        rows = from_bands(w.type, _bands(w)[ids // height])
        return decode(w.type, rows[np.arange(len(ids)) * height + ids % height])

    def dequantize(self, w: Matrix) -> Floats:
        return torch.cat([torch.empty(0, w.cols), *(tile for _, tile in _tiles(w))]).numpy()

    def linears(self, x: Floats, all: Linears, norm: Floats | None = None, eps: float = 0.0) -> list[Floats]:
        check_linears(x, all, norm)
        return [y.numpy() for y in _linears(_tensor(x), all, norm, eps)]

    def feed_forward(
        self, x: Floats, layer: FeedForward, norm: Floats | None = None, eps: float = 0.0
    ) -> Floats:
        check_linears(x, layer.enter, norm)
        return _feed_forward(_tensor(x), layer, norm, eps).numpy()

    def experts(self, x: Floats, all: Sequence[FeedForward], routes: Routes, into: Floats) -> None:
        check_experts(x, all, routes, into)
        hidden, sums = _tensor(x), _tensor(into)
        tokens, factors = _tensor(routes.tokens), _tensor(routes.factors)
        for layer, (start, stop) in zip(all, pairwise(routes.starts), strict=True):
            rows = tokens[start:stop]
            sums.index_add_(0, rows, _feed_forward(hidden[rows], layer) * factors[start:stop, None])

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        check_norm(x, weight)
        return fixed_order.rms_norm(x, weight, eps)

    def scores(self, x: Floats, router: Linears) -> Floats:
        check_linears(x, router)
        (matrix,), (bias,) = router.matrices, router.biases
        return fixed_order.scores(x, self.dequantize(matrix), bias)

    def attention(
        self, kv: KvPages, segments: Segments, q: Floats, k: Floats, v: Floats, scoring: Scoring
    ) -> Floats:
        check_attention(kv, segments, q, k, v, scoring)
        return attend(kv, segments, q, k, v, scoring)


def quantised_inputs(x: Floats, bits: InputBits | Literal[14] = WIDE_INPUTS) -> Floats:
    """x (T, cols), float32, rounded to 16 bits: every 32 columns become whole multiples, from -32639 to 32639, of
    1/32639 of their largest magnitude; halves are rounded to even. To 8 bits: with 127 instead of 32639. To 14 bits,
    which go with `as_words`: with 8159.

    A group with an infinite or NaN input becomes NaN. Native kernels multiply the whole numbers exactly. 32639 is the
    largest number that a high and a low byte, both signed, stand for: machines differ in what they can multiply.
    """
    return _quantised(_tensor(x), bits).numpy()


def as_words(weights: Floats) -> Floats:
    """bf16 weights (rows, cols), float32, as machines round them that multiply words twice as fast as floats, AVX2's:
    every 128 columns become whole multiples of 2^-12 of a power of two, the greatest that their largest magnitude
    reaches; halves are rounded to even. So all from a 32nd of it on keep their bits. They take inputs of 14 bits.

    128 columns with an infinite or NaN weight become NaN.
    """
    rows, cols = weights.shape
    filled = np.zeros((rows, -(-cols // WORD_COLUMNS) * WORD_COLUMNS), np.float32)
    filled[:, :cols] = weights
    groups = filled.reshape(rows, -1, WORD_COLUMNS)
    largest = np.abs(groups).max(-1, keepdims=True)
    _, exponent = np.frexp(np.where(np.isfinite(largest), largest, 1))
    unit = np.ldexp(np.float32(1), np.maximum(exponent - 1, -114) - 12)
    words = np.where(np.isfinite(largest), np.rint(groups / unit) * unit, np.float32(np.nan))
    return words.reshape(filled.shape)[:, :cols]


def decode(kind: WeightType, data: Bytes) -> Floats:
    """Rows of stored bytes, uint8 (n, row bytes), as float32 (n, cols)."""
    return _decoded(kind, data).numpy()


def _tensor(array: Array) -> Tensor:
    """A tensor in the same memory, or in a copy if the array is not contiguous."""
    return torch.from_numpy(np.ascontiguousarray(array))


def _bands(w: Matrix) -> Bytes:
    return w.data.reshape(-1, w.type.band_rows * w.type.row_bytes(w.cols))


def _tiles(w: Matrix) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 rows) of the weights, one part after the other."""
    bands = _bands(w)
    step = max(1, TILE_BYTES // (4 * w.cols * w.type.band_rows))
    for start in range(0, bands.shape[0], step):
        row = start * w.type.band_rows
        yield row, _decoded(w.type, from_bands(w.type, bands[start : start + step]))[: w.rows - row]


def _linears(x: Tensor, all: Linears, norm: Floats | None = None, eps: float = 0.0) -> list[Tensor]:
    if norm is not None:
        x = _normed(x, norm, eps)
    each = zip(all.matrices, all.biases, all.input_bits, strict=True)
    return [_linear(x, w, bias, bits) for w, bias, bits in each]


def _linear(x: Tensor, w: Matrix, bias: Floats | None, input_bits: InputBits) -> Tensor:
    """x (T, cols) @ w.T + bias (rows,), float32 (T, rows); weights are decoded tile by tile."""
    if w.type.quantised:
        x = _quantised(x, input_bits)
    out = torch.empty(x.shape[0], w.rows)
    for row, tile in _tiles(w):
        out[:, row : row + tile.shape[0]] = x @ tile.T
    return out if bias is None else out.add_(_tensor(bias))


def _quantised(x: Tensor, bits: InputBits | Literal[14]) -> Tensor:
    groups = x.reshape(x.shape[0], x.shape[1] // INPUT_GROUP, INPUT_GROUP)  # (T, cols / 32, 32)
    largest = groups.abs().amax(-1, keepdim=True)
    # A tensor: torch may divide by a plain number less exactly.
    most = torch.full_like(largest, _MOST_INPUT[bits])
    zeros = largest < SMALLEST_INPUT
    scale = (largest / most).masked_fill(zeros, 0).masked_fill(~largest.isfinite(), torch.nan)
    inverse = (most / largest).masked_fill(zeros, 0)
    return ((groups * inverse).round() * scale).reshape(x.shape)


def _feed_forward(x: Tensor, layer: FeedForward, norm: Floats | None = None, eps: float = 0.0) -> Tensor:
    gate, up = _linears(x, layer.enter, norm, eps)
    return _linears(ACTIVATIONS[layer.form.activation](gate) * up, layer.leave)[0]


def _normed(x: Tensor, weight: Floats, eps: float) -> Tensor:
    return _tensor(fixed_order.rms_norm(x.numpy(), weight, eps))


def _decoded(kind: WeightType, data: Bytes) -> Tensor:
    return decoded(kind, _tensor(data))


def decoded(kind: WeightType, data: Tensor) -> Tensor:
    """As `decode`, of a tensor on any device."""
    rows, row_bytes = data.shape
    blocks = data.reshape(-1, kind.block_bytes)  # (N, block bytes)
    cols = row_bytes // kind.block_bytes * kind.block_weights
    return _DECODERS[kind.name](blocks).reshape(rows, cols)


def _floats(field: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (N, k) as float32 (N, k / itemsize). The clone makes them aligned, which torch needs."""
    return field.clone(memory_format=torch.contiguous_format).view(dtype).float()


def _half(field: Tensor) -> Tensor:
    return _floats(field, torch.float16)


@cache
def _constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Brought there once, without waiting for what the device has to do before: drivers take up to 64 KB at once."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _bits(field: Tensor, shifts: tuple[int, ...], mask: int, group: int) -> Tensor:
    """Bit fields of bytes (N, k): every run of `group` bytes is read once per shift; (N, k * shifts)."""
    n, k = field.shape
    runs = field.reshape(n, k // group, 1, group)  # (N, k / group, 1, group)
    shift = _constant(shifts, torch.uint8, field.device).view(-1, 1)
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
    values = _constant(IQ4_NL_VALUES, torch.float32, b.device)
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


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": lambda gate: gelu(gate, approximate="tanh"),
}

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
