"""Quantising: the weights that the `gguf` package reads back are close to ours, closer than with its own rounding."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from fakes.homes import ones, randn, zeros
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels import OperandError, WeightType
from shoal.kernels.arrays import Bytes, Floats
from shoal.kernels.quantise import quantise
from shoal.kernels.types import Q4_0, Q4_K, Q8_0

kinds = pytest.mark.parametrize("kind", [Q8_0, Q4_0], ids=lambda kind: kind.name)


def decoded(kind: WeightType, stored: Bytes) -> Floats:
    values: Floats = gguf.dequantize(stored, gguf.GGMLQuantizationType(kind.id))
    return values


@kinds
@settings(max_examples=20)
@given(
    rows=st.integers(1, 20),
    blocks=st.integers(1, 3),
    scale=st.sampled_from([0.01, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_no_block_is_further_off_than_with_the_plain_scale(
    kind: WeightType, rows: int, blocks: int, scale: float, seed: int
) -> None:
    """The plain scale makes the largest weight the largest whole number; the search may only find better ones."""
    x = randn(rows, blocks * 256, seed=seed) * np.float32(scale)
    groups = x.reshape(-1, kind.block_weights)
    off = decoded(kind, quantise(kind, x)).reshape(groups.shape) - groups
    plain = np.abs(groups).max(-1, keepdims=True) / {"Q8_0": 127, "Q4_0": 8}[kind.name]  # (N, 1)
    if kind is Q4_0:  # the largest weight becomes -8, whatever its sign
        plain = np.where(groups.max(-1, keepdims=True) >= -groups.min(-1, keepdims=True), -plain, plain)
    low, high = {"Q8_0": (-127, 127), "Q4_0": (-8, 7)}[kind.name]
    most = (groups / plain).round().clip(low, high) * plain - groups
    slack = np.square(plain * 2.0**-10 * high) * kind.block_weights  # scales are stored in half precision
    assert (np.square(off).sum(-1) <= np.square(most).sum(-1) * 1.01 + slack.squeeze(-1)).all()
    assert (np.abs(off) <= 2 * np.abs(plain)).all()


@kinds
def test_the_error_is_small_and_below_rounding_to_the_nearest(kind: WeightType) -> None:
    x = randn(64, 2048) * np.float32(0.02)
    error = np.linalg.norm(decoded(kind, quantise(kind, x)) - x) / np.linalg.norm(x)
    assert error < {"Q8_0": 0.0055, "Q4_0": 0.083}[kind.name]
    theirs = decoded(kind, gguf.quantize(x, gguf.GGMLQuantizationType(kind.id)))
    assert error <= 1.001 * np.linalg.norm(theirs - x) / np.linalg.norm(x)


@kinds
def test_tiles_do_not_show(kind: WeightType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(7, 1024)
    whole = quantise(kind, x)
    monkeypatch.setattr("shoal.kernels.quantise._TILE_WEIGHTS", 512)
    assert np.array_equal(quantise(kind, x), whole)


@kinds
def test_zeros_and_single_weights_come_back(kind: WeightType) -> None:
    x = zeros(3, 256)
    x[1, 200], x[2, 17] = 3.0, -1e-30
    got = decoded(kind, quantise(kind, x))
    np.testing.assert_allclose(got, x, rtol=1e-2, atol=1e-20)


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1e38])
def test_weights_without_a_scale_are_refused(kind: WeightType, value: float) -> None:
    x = ones(1, 256)
    x[0, 3] = value
    with pytest.raises(OperandError, match="cannot be quantised"):
        quantise(kind, x)


def test_other_types_and_lengths_are_refused() -> None:
    with pytest.raises(OperandError, match="Q4_K: only float32, as one of Q8_0, Q4_0"):
        quantise(Q4_K, ones(1, 256))
    with pytest.raises(OperandError, match="multiple of 32"):
        quantise(Q8_0, ones(1, 40))
    with pytest.raises(OperandError, match="float16"):
        quantise(Q8_0, np.ones((1, 32), np.float16))
