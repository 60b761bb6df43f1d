"""Inputs of quantised weights are rounded to 16 or 8 bits: how far that is from exact, what becomes of extremes."""

from collections.abc import Iterator

import numpy as np
import pytest
from fakes.homes import HOMES, TRUTH, assert_close, linear, randn, zeros
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.random_weights import random_matrix

from shoal import kernels
from shoal.kernels import WEIGHT_TYPES, InputBits, WeightType, reference
from shoal.kernels.arrays import Floats
from shoal.kernels.homes import choose
from shoal.kernels.types import Q8_0


@pytest.fixture(params=HOMES)
def home(request: pytest.FixtureRequest) -> Iterator[str]:
    choose(request.param)
    yield request.param
    choose()


MOST: dict[InputBits, int] = {16: 32639, 8: 127}
QUANTISED = [kind for kind in WEIGHT_TYPES if kind.quantised]
each_type = pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
each_bits = pytest.mark.parametrize("bits", MOST)


def ends(bits: InputBits) -> list[int]:
    """Inputs with the largest bytes: a low byte of 16 bits is 127, -127 or -128."""
    most = MOST[bits]
    return [most, -most, *((most - 255, 255 - most) if bits == 16 else ())]


def by_group(x: Floats) -> Floats:
    return x.reshape(x.shape[0], -1, 32)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), exponent=st.integers(-26, 36), bits=st.sampled_from(sorted(MOST)))
def test_inputs_lose_at_most_half_a_step(seed: int, exponent: int, bits: InputBits) -> None:
    x = randn(3, 512, seed=seed) * np.float32(10.0**exponent)
    steps = np.abs(by_group(x)).max(-1, keepdims=True) / MOST[bits]
    lost = np.abs(by_group(reference.quantised_inputs(x, bits)) - by_group(x))
    assert (lost <= 0.51 * steps).all()


@each_type
@each_bits
def test_distance_from_exact_is_that_of_the_rounding(home: str, kind: WeightType, bits: InputBits) -> None:
    w = random_matrix(kind, 40, 1024)
    x = randn(5, 1024)
    full = TRUTH.dequantize(w).astype(float)
    steps = np.abs(by_group(x)).max(-1, keepdims=True) / MOST[bits]
    half_steps = (steps / 2).repeat(32, -1).reshape(5, 1024).astype(float)
    exact = x.astype(float) @ full.T
    lost = linear(x, w, bits=bits).astype(float) - exact
    assert (np.abs(lost) <= 1.02 * half_steps @ np.abs(full).T).all()
    # Roundings are independent and uniform: the variance of each is step² / 12.
    expected = np.sqrt(np.square(half_steps * 2) / 12 @ np.square(full).T)
    assert 0.7 < np.sqrt(np.square(lost / expected).mean()) < 1.3
    assert np.linalg.norm(lost) / np.linalg.norm(exact) < 1.6 / MOST[bits]


@each_type
@each_bits
def test_whole_inputs_are_exact(home: str, kind: WeightType, bits: InputBits) -> None:
    w = random_matrix(kind, 9, 512)
    most = MOST[bits]
    x = np.random.default_rng(1).integers(-most, most, (3, 512), endpoint=True).astype(np.float32)
    x[:, ::32] = most
    full = TRUTH.dequantize(w).astype(float)
    truth, magnitude = x @ full.T, np.abs(x) @ np.abs(full).T
    assert (np.abs(linear(x, w, bits=bits) - truth) <= 2e-6 * magnitude).all()


@each_bits
def test_halves_round_to_even(home: str, bits: InputBits) -> None:
    w, most = random_matrix(Q8_0, 64, 32), MOST[bits]
    x = np.array([[most, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5] * 4], np.float32)
    rounded = np.array([[most, 0, 2, 2, 0, -2, -2, 126] * 4], np.float32)
    assert_close(linear(x, w, bits=bits), linear(rounded, w, bits=bits), rtol=0, atol=0)


@each_type
@each_bits
def test_extreme_weights_do_not_overflow(home: str, kind: WeightType, bits: InputBits) -> None:
    """All bytes are 255 or 0, and all inputs those with the largest bytes: sums stay whole and exact."""
    for byte in (0, 255):
        stored = np.full((3, kind.row_bytes(512)), byte, np.uint8)
        blocks = stored.reshape(-1, kind.block_bytes)
        for at in kind.halves:
            blocks[:, at : at + 2] = np.array([0.5], np.float16).view(np.uint8)
        w = kernels.from_stored(kind, 3, 512, stored)
        full = TRUTH.dequantize(w).astype(float)
        for value in ends(bits):
            x = np.full((9, 512), value, np.float32)
            x[:, ::32] = MOST[bits]
            magnitude = MOST[bits] * np.abs(full).sum(1)
            for tokens in (1, 2, 9):
                lost = np.abs(linear(x[:tokens], w, bits=bits) - x[:tokens].astype(float) @ full.T)
                assert (lost <= 1e-5 * magnitude).all()  # an overflow loses far more


@each_type
@each_bits
def test_extremes_in_any_order_do_not_overflow(home: str, kind: WeightType, bits: InputBits) -> None:
    """The least and the greatest weights and inputs side by side, whose sums of two words are as large as they get: few
    rows and many, odd numbers of them."""
    source = np.random.default_rng(kind.id)
    stored = source.choice(np.array([0, 127, 128, 255], np.uint8), (19, kind.row_bytes(512)))
    blocks = stored.reshape(-1, kind.block_bytes)
    for at in kind.halves:
        blocks[:, at : at + 2] = np.array([0.5], np.float16).view(np.uint8)
    w = kernels.from_stored(kind, 19, 512, stored)
    full = TRUTH.dequantize(w).astype(float)
    x = source.choice(np.array([*ends(bits), 0], np.float32), (99, 512))
    x[:, ::32] = MOST[bits]
    magnitude = np.abs(x).astype(float) @ np.abs(full).T
    for tokens in (1, 5, 99):
        lost = np.abs(linear(x[:tokens], w, bits=bits) - x[:tokens].astype(float) @ full.T)
        assert (lost <= 1e-5 * magnitude[:tokens] + 1e-3).all()


@each_type
@each_bits
def test_zeros_and_magnitudes_of_any_size(home: str, kind: WeightType, bits: InputBits) -> None:
    w = random_matrix(kind, 7, 512)
    assert np.array_equal(linear(zeros(3, 512), w, bits=bits), zeros(3, 7))
    x = randn(2, 512)
    once = linear(x, w, bits=bits)
    for exponent in (-90, -30, 30, 100):  # powers of two round nothing
        power = np.float32(2.0**exponent)
        assert_close(linear(x * power, w, bits=bits), once * power, rtol=1e-5, atol=1e-30)
    assert np.array_equal(linear(x * np.float32(1e-38), w, bits=bits), zeros(2, 7))
    mixed = x.copy()
    mixed[:, :32] = 0  # a group of zeros beside others
    assert np.isfinite(linear(mixed, w, bits=bits)).all()


@each_type
@each_bits
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_its_row_only(
    home: str, kind: WeightType, bits: InputBits, bad: float
) -> None:
    w = random_matrix(kind, 9, 512)
    x = randn(7, 512)
    clean = linear(x, w, bits=bits)
    x[2, 500], x[4, 0] = bad, bad
    got = linear(x, w, bits=bits)
    assert np.isnan(got[[2, 4]]).all()
    kept = [0, 1, 3, 5, 6]
    assert_close(got[kept], clean[kept], rtol=1e-5 if home == "reference" else 0, atol=1e-5)
    assert np.isnan(linear(x[2:3], w, bits=bits)).all()


@each_type
@each_bits
def test_homes_agree_bit_for_bit_where_they_fuse(kind: WeightType, bits: InputBits) -> None:
    """Whole sums are exact, and everywhere a lane is a row, so the width of vectors makes no difference."""
    fused = [name for name in HOMES if name not in ("reference", "scalar")]
    w, x = random_matrix(kind, 21, 768), randn(23, 768)
    results = []
    for name in fused:
        choose(name)
        results.append(linear(x, w, bits=bits))
    choose()
    assert all(np.array_equal(result, results[0]) for result in results)
