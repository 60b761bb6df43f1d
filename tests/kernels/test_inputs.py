"""Inputs of quantised weights are rounded to 16 bits: how far that is from exact, and what becomes of extremes."""

from collections.abc import Iterator

import numpy as np
import pytest
from fakes.homes import HOMES, TRUTH, assert_close, linear, randn, zeros
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.random_weights import random_matrix

from shoal import kernels
from shoal.kernels import WEIGHT_TYPES, WeightType, reference
from shoal.kernels.arrays import Floats
from shoal.kernels.homes import choose
from shoal.kernels.types import Q4_K, Q8_0


@pytest.fixture(params=HOMES)
def home(request: pytest.FixtureRequest) -> Iterator[str]:
    choose(request.param)
    yield request.param
    choose()


MOST = 32639
QUANTISED = [kind for kind in WEIGHT_TYPES if kind.quantised]
each_type = pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)


def by_group(x: Floats) -> Floats:
    return x.reshape(x.shape[0], -1, 32)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), exponent=st.integers(-26, 36))
def test_inputs_lose_at_most_half_a_step(seed: int, exponent: int) -> None:
    x = randn(3, 512, seed=seed) * np.float32(10.0**exponent)
    steps = np.abs(by_group(x)).max(-1, keepdims=True) / MOST
    lost = np.abs(by_group(reference.quantised_inputs(x)) - by_group(x))
    assert (lost <= 0.51 * steps).all()


@each_type
def test_distance_from_exact_is_that_of_the_rounding(home: str, kind: WeightType) -> None:
    w = random_matrix(kind, 40, 1024)
    x = randn(5, 1024)
    full = TRUTH.dequantize(w).astype(float)
    steps = np.abs(by_group(x)).max(-1, keepdims=True) / MOST
    half_steps = (steps / 2).repeat(32, -1).reshape(5, 1024).astype(float)
    exact = x.astype(float) @ full.T
    lost = linear(x, w).astype(float) - exact
    assert (np.abs(lost) <= 1.02 * half_steps @ np.abs(full).T).all()
    # Roundings are independent and uniform: the variance of each is step² / 12.
    expected = np.sqrt(np.square(half_steps * 2) / 12 @ np.square(full).T)
    assert 0.7 < np.sqrt(np.square(lost / expected).mean()) < 1.3
    assert np.linalg.norm(lost) / np.linalg.norm(exact) < 5e-5


@each_type
def test_whole_inputs_are_exact(home: str, kind: WeightType) -> None:
    w = random_matrix(kind, 9, 512)
    x = np.random.default_rng(1).integers(-MOST, MOST, (3, 512), endpoint=True).astype(np.float32)
    x[:, ::32] = MOST
    full = TRUTH.dequantize(w).astype(float)
    truth, magnitude = x @ full.T, np.abs(x) @ np.abs(full).T
    assert (np.abs(linear(x, w) - truth) <= 2e-6 * magnitude).all()


def test_halves_round_to_even(home: str) -> None:
    w = random_matrix(Q8_0, 64, 32)
    x = np.array([[MOST, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5] * 4], np.float32)
    rounded = np.array([[MOST, 0, 2, 2, 0, -2, -2, 126] * 4], np.float32)
    assert_close(linear(x, w), linear(rounded, w), rtol=0, atol=0)


@each_type
def test_extreme_weights_do_not_overflow(home: str, kind: WeightType) -> None:
    """All bytes are 255 or 0, and all inputs those with the largest high or low byte: sums stay whole and exact."""
    for byte in (0, 255):
        stored = np.full((3, kind.row_bytes(512)), byte, np.uint8)
        blocks = stored.reshape(-1, kind.block_bytes)
        for at in kind.halves:
            blocks[:, at : at + 2] = np.array([0.5], np.float16).view(np.uint8)
        w = kernels.from_stored(kind, 3, 512, stored)
        full = TRUTH.dequantize(w).astype(float)
        for value in (MOST, -MOST, MOST - 255, 255 - MOST):  # a low byte is 127, -127 or -128
            x = np.full((9, 512), value, np.float32)
            x[:, ::32] = MOST
            magnitude = MOST * np.abs(full).sum(1)
            for tokens in (1, 2, 9):
                lost = np.abs(linear(x[:tokens], w) - x[:tokens].astype(float) @ full.T)
                assert (lost <= 1e-5 * magnitude).all()  # an overflow loses far more


@each_type
def test_extremes_in_any_order_do_not_overflow(home: str, kind: WeightType) -> None:
    """The least and the greatest weights and inputs side by side, whose sums of two words are as large as they get: few
    rows and many, odd numbers of them."""
    source = np.random.default_rng(kind.id)
    stored = source.choice(np.array([0, 127, 128, 255], np.uint8), (19, kind.row_bytes(512)))
    blocks = stored.reshape(-1, kind.block_bytes)
    for at in kind.halves:
        blocks[:, at : at + 2] = np.array([0.5], np.float16).view(np.uint8)
    w = kernels.from_stored(kind, 19, 512, stored)
    full = TRUTH.dequantize(w).astype(float)
    x = source.choice(np.array([MOST, -MOST, MOST - 255, 255 - MOST, 0], np.float32), (99, 512))
    x[:, ::32] = MOST
    magnitude = np.abs(x).astype(float) @ np.abs(full).T
    for tokens in (1, 5, 99):
        lost = np.abs(linear(x[:tokens], w) - x[:tokens].astype(float) @ full.T)
        assert (lost <= 1e-5 * magnitude[:tokens] + 1e-3).all()


@each_type
def test_zeros_and_magnitudes_of_any_size(home: str, kind: WeightType) -> None:
    w = random_matrix(kind, 7, 512)
    assert np.array_equal(linear(zeros(3, 512), w), zeros(3, 7))
    x = randn(2, 512)
    once = linear(x, w)
    for exponent in (-90, -30, 30, 100):  # powers of two round nothing
        power = np.float32(2.0**exponent)
        assert_close(linear(x * power, w), once * power, rtol=1e-5, atol=1e-30)
    assert np.array_equal(linear(x * np.float32(1e-38), w), zeros(2, 7))
    mixed = x.copy()
    mixed[:, :32] = 0  # a group of zeros beside others
    assert np.isfinite(linear(mixed, w)).all()


@each_type
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_its_row_only(home: str, kind: WeightType, bad: float) -> None:
    w = random_matrix(kind, 9, 512)
    x = randn(7, 512)
    clean = linear(x, w)
    x[2, 500], x[4, 0] = bad, bad
    got = linear(x, w)
    assert np.isnan(got[[2, 4]]).all()
    kept = [0, 1, 3, 5, 6]
    assert_close(got[kept], clean[kept], rtol=1e-5 if home == "reference" else 0, atol=1e-5)
    assert np.isnan(linear(x[2:3], w)).all()


def test_homes_agree_bit_for_bit_where_they_fuse() -> None:
    """Whole sums are exact, and everywhere a lane is a row, so the width of vectors makes no difference."""
    fused = [name for name in HOMES if name not in ("reference", "scalar")]
    w, x = random_matrix(Q4_K, 21, 768), randn(9, 768)
    results = []
    for name in fused:
        choose(name)
        results.append(linear(x, w))
    choose()
    assert all(np.array_equal(result, results[0]) for result in results)
