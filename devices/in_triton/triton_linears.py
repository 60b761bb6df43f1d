"""Triton kernels of linears with quantised weights: for one row of inputs, and for many.

What bounds one row is the device's memory: weights are read once, as they lie, and nothing else of their size is read
or written. Each program has a band of one of up to three matrices. Inputs come in the order in which it walks
(`arranged`), so eight neighbours of a warp read 32 bytes that lie together.
"""

import triton
import triton.language as tl

from .triton_weights import SUMS, products


@triton.jit
def arranged(
    x,
    norm,
    out,
    sums,
    scales,
    eps,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
    NORMED: tl.constexpr,
    MANY: tl.constexpr,
):
    """Rows of x (T, COLS) for `products`: column 64 g + e lies at [t, e, g], after RMS norm if NORMED. One row:
    float32, and the sums of 16 columns [t, j, g]. MANY: float16, divided by `scales` [t], so that the largest is 256.
    Program (t, part): STEP groups; where all of a row counts, there is one part."""
    t = tl.program_id(0)
    GROUPS: tl.constexpr = COLS // 64
    g = tl.program_id(1) * STEP + tl.arange(0, STEP)
    e = tl.arange(0, 64)
    column = g[:, None] * 64 + e[None, :]
    live = g[:, None] < GROUPS
    its = tl.load(x + t.to(tl.int64) * COLS + column, mask=live, other=0.0)
    if NORMED:
        mean = tl.sum(tl.sum(its * its, 1), 0) / COLS
        its = its * (1.0 / tl.sqrt(mean + eps)) * tl.load(norm + column, mask=live, other=0.0)
    place = t.to(tl.int64) * COLS + e[None, :] * GROUPS + g[:, None]
    if MANY:
        largest = tl.max(tl.max(tl.abs(its), 1), 0)
        scale = tl.where(largest > 1e-30, largest / 256, 1.0)
        tl.store(scales + t, scale)
        tl.store(out + place, (its / scale).to(tl.float16), mask=live)
    else:
        tl.store(out + place, its, mask=live)
        j = tl.arange(0, SUMS)
        added = tl.sum(tl.reshape(its, (STEP, SUMS, 16)), 2)
        tl.store(sums + (t * SUMS + j[None, :]) * GROUPS + g[:, None], added, mask=live)


@triton.jit
def _row_of(
    w, x, sums, one, band, COLS: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr
):
    """(16,): the products of a band with one row of inputs; of the part that program (_, part) of SPLIT has."""
    r = tl.arange(0, 16)
    total = tl.zeros((STEP, 16), tl.float32)
    part = tl.program_id(1)
    total = products(total, w, x, sums, one, band + r * 0, r, part, r, 1, COLS, KIND, STEP, SPLIT, False)
    return tl.sum(total, 0)


@triton.jit
def _put(
    w,
    x,
    sums,
    one,
    bias,
    y,
    band,
    rows,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    BIASED: tl.constexpr,
):
    its = _row_of(w, x, sums, one, band, COLS, KIND, STEP, SPLIT)
    row = band * 16 + tl.arange(0, 16)
    if BIASED:
        if tl.program_id(1) == 0:
            its += tl.load(bias + row, mask=row < rows, other=0.0)
    tl.store(y + tl.program_id(1) * rows + row, its, mask=row < rows)


@triton.jit
def one_row(
    x,
    sums,
    one,
    w0,
    w1,
    w2,
    y0,
    y1,
    y2,
    bias0,
    bias1,
    bias2,
    rows0,
    rows1,
    rows2,
    COLS: tl.constexpr,
    KIND0: tl.constexpr,
    KIND1: tl.constexpr,
    KIND2: tl.constexpr,
    BIASED0: tl.constexpr,
    BIASED1: tl.constexpr,
    BIASED2: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Up to three matrices (KIND "" is none) by one row; y (SPLIT, rows), whose parts are to be added. Program
    (band, part): bands of all matrices, one after the other."""
    band = tl.program_id(0)
    bands0 = tl.cdiv(rows0, 16)
    bands1 = bands0 + tl.cdiv(rows1, 16)
    if band < bands0:
        _put(w0, x, sums, one, bias0, y0, band, rows0, COLS, KIND0, STEP, SPLIT, BIASED0)
    if KIND1 != "":
        if (band >= bands0) & (band < bands1):
            _put(w1, x, sums, one, bias1, y1, band - bands0, rows1, COLS, KIND1, STEP, SPLIT, BIASED1)
    if KIND2 != "":
        if band >= bands1:
            _put(w2, x, sums, one, bias2, y2, band - bands1, rows2, COLS, KIND2, STEP, SPLIT, BIASED2)


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(2.0 * inner) * up


@triton.jit
def gate_and_up(
    x,
    sums,
    one,
    gate,
    up,
    gate_bias,
    up_bias,
    out,
    out_sums,
    FFN: tl.constexpr,
    COLS: tl.constexpr,
    KIND0: tl.constexpr,
    KIND1: tl.constexpr,
    BIASED0: tl.constexpr,
    BIASED1: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """activation(gate x) * (up x), laid as `arranged` lays one row of FFN columns. Program: one band of both."""
    band = tl.program_id(0)
    r = tl.arange(0, 16)
    first = _row_of(gate, x, sums, one, band, COLS, KIND0, STEP, 1)
    second = _row_of(up, x, sums, one, band, COLS, KIND1, STEP, 1)
    if BIASED0:
        first += tl.load(gate_bias + band * 16 + r)
    if BIASED1:
        second += tl.load(up_bias + band * 16 + r)
    its = activated(first, second, ACTIVATION)
    tl.store(out + (16 * (band % 4) + r) * (FFN // 64) + band // 4, its)
    tl.store(out_sums + (band % 4) * (FFN // 64) + band // 4, tl.sum(its, 0))


@triton.jit(do_not_specialize=["T"])
def many_rows(
    x,
    scales,
    one,
    w,
    bias,
    y,
    T,
    rows,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    BIASED: tl.constexpr,
    STEP: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y (SPLIT, T, rows), whose parts are to be added: a matrix by T rows, as `arranged` lays many. Program
    (part of rows, part of T, part of columns) has ROWS by INPUTS numbers, on tensor cores, summed in float32."""
    part = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    band = tl.minimum(row // 16, (rows - 1) // 16)
    total = tl.zeros((INPUTS, ROWS), tl.float32)
    total = products(total, w, x, scales, one, band, row % 16, part, t, T, COLS, KIND, STEP, SPLIT, True)
    total *= tl.load(scales + t, mask=t < T, other=0.0)[:, None]
    if BIASED:
        if part == 0:
            total += tl.load(bias + row, mask=row < rows, other=0.0)[None, :]
    place = (part.to(tl.int64) * T + t[:, None]) * rows + row[None, :]
    tl.store(y + place, total, mask=(t < T)[:, None] & (row < rows)[None, :])
