"""The homes of the kernels that run on this machine, random numbers for them, and how near their results must be."""

from __future__ import annotations

import numpy as np

from shoal.kernels import WIDE_INPUTS, InputBits, Linears, Matrix
from shoal.kernels.arrays import Array, Floats
from shoal.kernels.homes import REFERENCE, cpu, runnable
from shoal.kernels.reference import ReferenceHome

*NATIVE, _ = runnable()
HOMES = [REFERENCE, *NATIVE]
TRUTH = ReferenceHome()


def linear(x: Floats, w: Matrix, bias: Floats | None = None, bits: InputBits = WIDE_INPUTS) -> Floats:
    """x @ w.T + bias, by the kernels that were chosen last."""
    return cpu().linears(x, Linears((w,), (bias,), bits))[0]


def randn(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def zeros(*shape: int) -> Floats:
    return np.zeros(shape, np.float32)


def ones(*shape: int) -> Floats:
    return np.ones(shape, np.float32)


def frozen(array: Array) -> Array:
    """The same memory, read-only as arrays over the bytes of a file are."""
    view = array.view()
    view.flags.writeable = False
    return view


def layouts(x: Floats) -> list[Floats]:
    """The same numbers (T, n), in every way in which they may lie in memory."""
    rows, columns = x.repeat(2, 0), x.repeat(3, 1)
    off = np.frombuffer(b"odd" + x.tobytes(), np.uint8)[3:].view(np.float32).reshape(x.shape)
    return [x, frozen(x), np.asfortranarray(x), x[::-1].copy()[::-1], rows[::2], columns[:, 1::3], off]


def assert_close(got: Array, truth: Array, rtol: float, atol: float, equal_nan: bool = False) -> None:
    """Shape and dtype are the same, and no numbers are further apart than atol + rtol * |truth|."""
    assert got.dtype == truth.dtype
    np.testing.assert_allclose(got, truth, rtol, atol, equal_nan=equal_nan, strict=True)
