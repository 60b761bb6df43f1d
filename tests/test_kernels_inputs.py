"""Inputs of quantised weights, rounded to 16 bits: how far from exact, and what extremes become."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal import kernels
from shoal.kernels import WEIGHT_TYPES, KernelError, WeightType, dispatch, library, reference
from shoal.kernels.sample import random_matrix
from shoal.kernels.types import Q4_K, Q8_0


def homes_here() -> list[str]:
    names = ["reference"]
    for name in ("avx512vnni", "avx512", "avx2", "neon_dot", "neon", "scalar"):
        try:
            names.append(library.Native(name).name)
        except KernelError:
            continue
    return names


@pytest.fixture(params=homes_here())
def home(request: pytest.FixtureRequest) -> Iterator[str]:
    dispatch.choose(request.param)
    yield request.param
    dispatch.choose()


MOST = 32639
QUANTISED = [kind for kind in WEIGHT_TYPES if kind.quantised]
each_type = pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_group(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, 32)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), exponent=st.integers(-26, 36))
def test_inputs_lose_at_most_half_a_step(seed: int, exponent: int) -> None:
    x = randn(3, 512, seed=seed) * 10.0**exponent
    steps = by_group(x).abs().amax(-1, keepdim=True) / MOST
    lost = (by_group(reference.quantised_inputs(x)) - by_group(x)).abs()
    assert (lost <= 0.51 * steps).all()


@each_type
def test_distance_from_exact_is_that_of_the_rounding(home: str, kind: WeightType) -> None:
    w = random_matrix(kind, 40, 1024)
    x = randn(5, 1024)
    full = reference.dequantize(w).double()
    steps = by_group(x).abs().amax(-1, keepdim=True) / MOST
    half_steps = (steps / 2).expand(-1, -1, 32).reshape(5, 1024).double()
    exact = x.double() @ full.T
    lost = kernels.linear(x, w).double() - exact
    assert (lost.abs() <= 1.02 * half_steps @ full.abs().T).all()
    # Roundings are independent and uniform: the variance of each is step² / 12.
    expected = ((half_steps * 2).square() / 12 @ full.square().T).sqrt()
    assert 0.7 < (lost / expected).square().mean().sqrt() < 1.3
    assert lost.norm() / exact.norm() < 5e-5


@each_type
def test_whole_inputs_are_exact(home: str, kind: WeightType) -> None:
    w = random_matrix(kind, 9, 512)
    x = torch.randint(-MOST, MOST + 1, (3, 512), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::32] = MOST
    truth = x.double() @ reference.dequantize(w).double().T
    magnitude = x.abs().double() @ reference.dequantize(w).abs().double().T
    assert ((kernels.linear(x, w) - truth).abs() <= 2e-6 * magnitude).all()


def test_halves_round_to_even(home: str) -> None:
    w = random_matrix(Q8_0, 64, 32)
    x = torch.tensor([[MOST, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5] * 4])
    rounded = torch.tensor([[MOST, 0.0, 2, 2, 0, -2, -2, 126] * 4])
    torch.testing.assert_close(kernels.linear(x, w), kernels.linear(rounded, w), rtol=0, atol=0)


@each_type
def test_extreme_weights_do_not_overflow(home: str, kind: WeightType) -> None:
    """Every byte all ones or all zeros, every input the largest: sums stay whole and exact."""
    for byte in (0, 255):
        stored = torch.full((3, kind.row_bytes(512)), byte, dtype=torch.uint8)
        blocks = stored.view(-1, kind.block_bytes)
        for at in kind.halves:
            blocks[:, at : at + 2] = torch.tensor([0.5]).half().view(torch.uint8)
        w = kernels.from_stored(kind, 3, 512, stored)
        x = torch.ones(9, 512)
        truth = reference.dequantize(w).double().sum(1).expand(9, 3)
        torch.testing.assert_close(kernels.linear(x, w).double(), truth, rtol=1e-6, atol=1e-6)


@each_type
def test_zeros_and_magnitudes_of_any_size(home: str, kind: WeightType) -> None:
    w = random_matrix(kind, 7, 512)
    assert torch.equal(kernels.linear(torch.zeros(3, 512), w), torch.zeros(3, 7))
    x = randn(2, 512)
    once = kernels.linear(x, w)
    for exponent in (-90, -30, 30, 100):  # powers of two round nothing
        torch.testing.assert_close(
            kernels.linear(x * 2.0**exponent, w), once * 2.0**exponent, rtol=1e-5, atol=1e-30
        )
    assert torch.equal(kernels.linear(x * 1e-38, w), torch.zeros(2, 7))
    mixed = x.clone()
    mixed[:, :32] = 0  # a group of zeros beside others
    assert kernels.linear(mixed, w).isfinite().all()


@each_type
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_its_row_only(home: str, kind: WeightType, bad: float) -> None:
    w = random_matrix(kind, 9, 512)
    x = randn(7, 512)
    clean = kernels.linear(x, w)
    x[2, 500], x[4, 0] = bad, bad
    got = kernels.linear(x, w)
    assert got[[2, 4]].isnan().all()
    kept = [0, 1, 3, 5, 6]
    torch.testing.assert_close(got[kept], clean[kept], rtol=1e-5 if home == "reference" else 0, atol=1e-5)
    assert kernels.linear(x[2:3], w).isnan().all()


def test_homes_agree_bit_for_bit_where_they_fuse() -> None:
    """Whole sums are exact and a row is a lane everywhere, so vector widths leave no trace."""
    fused = [name for name in homes_here() if name not in ("reference", "scalar")]
    w, x = random_matrix(Q4_K, 21, 768), randn(9, 768)
    results = []
    for name in fused:
        dispatch.choose(name)
        results.append(kernels.linear(x, w))
    dispatch.choose()
    assert all(torch.equal(result, results[0]) for result in results)
