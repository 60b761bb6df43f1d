"""A token goes to the best experts, among equals the lowest, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
from fakes.homes import HOMES, NATIVE
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels import OperandError
from shoal.kernels.homes import choose, cpu
from shoal.kernels.routing import Routing, best, likeliest, route


def random_scores(rows: int, experts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, experts), np.float32)


@pytest.mark.parametrize(("experts", "count"), [(1, 1), (4, 4), (8, 2), (60, 4), (128, 8)])
def test_the_best_are_chosen_and_distances_kept(experts: int, count: int) -> None:
    scores = random_scores(50, experts)
    chosen, behind = best(scores, count)
    assert np.array_equal(np.sort(chosen), np.sort(np.argsort(-scores, kind="stable")[:, :count]))
    assert np.array_equal(behind, (scores.max(-1, keepdims=True) - scores).astype(np.float64))


def test_of_equal_scores_the_lowest_experts_are_chosen() -> None:
    scores = np.array([[1, 2, 2, 2, 0], [3, 3, 3, 3, 3], [-1, -np.inf, -np.inf, -np.inf, -2]], np.float32)
    chosen, _ = best(scores, 3)
    assert np.sort(chosen).tolist() == [[1, 2, 3], [0, 1, 2], [0, 1, 4]]


def test_a_broken_row_is_its_own_trouble() -> None:
    scores = random_scores(3, 16)
    alone, _ = best(scores[2:], 4)
    scores[0], scores[1, 3] = np.nan, np.inf
    chosen, behind = best(scores, 4)
    assert np.array_equal(chosen[2:], alone)
    assert np.isnan(behind[0]).all()
    assert ((chosen >= 0) & (chosen < 16)).all()


def test_every_row_is_chosen_alike_alone() -> None:
    scores = random_scores(130, 64)
    chosen, _ = best(scores, 8)
    for rows in (1, 2, 7, 64):
        assert np.array_equal(best(scores[:rows], 8)[0], chosen[:rows])


def test_what_may_be_chosen_comes_by_its_odds() -> None:
    scores = random_scores(1, 64)
    assert likeliest(scores, 8) == np.argsort(-scores[0], kind="stable")[:8].tolist()
    rows = np.array([[9, 9, 0, 0, 0], [0, 0, 9, 8, 0], [0, 0, 9, 0, 8], [np.nan] * 5], np.float32)
    assert likeliest(rows, 2) == [2, 0, 1, 3, 4]
    assert likeliest(rows[-1:], 2) == []


def test_routes_are_by_expert_and_token_ascending() -> None:
    experts = np.array([[3, 0], [0, 7], [3, 7]])
    factors = np.arange(6, dtype=np.float32).reshape(3, 2)
    routing = Routing.of(experts, factors)
    assert routing.used == [0, 3, 7]
    assert routing.routes.starts == (0, 2, 4, 6)
    assert routing.routes.tokens.tolist() == [0, 1, 0, 2, 1, 2]
    assert routing.routes.factors.tolist() == [1, 2, 0, 4, 3, 5]


def assert_same(got: Routing, truth: Routing) -> None:
    assert got.used == truth.used
    assert got.routes.starts == truth.routes.starts
    assert got.routes.tokens.dtype == np.int64
    assert np.array_equal(got.routes.tokens, truth.routes.tokens)
    assert got.routes.factors.dtype == np.float32
    np.testing.assert_allclose(got.routes.factors, truth.routes.factors, rtol=2e-7, atol=3e-45)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), rows=st.sampled_from([0, 1, 2, 9, 300]), experts=st.integers(1, 130))
def test_native_kernels_route_as_the_reference_does(data: st.DataObject, rows: int, experts: int) -> None:
    """Also among scores of which many are equal, far apart, infinite or no numbers."""
    count, normalize = data.draw(st.integers(1, experts)), data.draw(st.booleans())
    source = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    scores = source.standard_normal((rows, experts)).astype(np.float32)
    kind = data.draw(st.sampled_from(["plain", "ties", "wide", "odd"]))
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "wide":
        scores *= np.float32(10.0) ** source.integers(-37, 38, scores.shape).astype(np.float32)
    elif kind == "odd":
        odd = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0], np.float32)
        scores = np.where(source.random(scores.shape) < 0.05, source.choice(odd, scores.shape), scores)
    with np.errstate(all="ignore"):
        truth = route(scores, count, normalize)
    for name in NATIVE:
        choose(name)
        got = cpu().route(scores, count, normalize)
        assert_same(got, truth)
        for row in range(min(rows, 3)):  # a row goes where it goes alone, with the same factors to the bit
            alone = cpu().route(scores[row : row + 1], count, normalize)
            mine = got.routes.tokens == row
            its = np.array(got.used).repeat(np.diff(got.routes.starts))[mine]
            assert its.tolist() == alone.used
            assert np.array_equal(got.routes.factors[mine], alone.routes.factors, equal_nan=True)
    choose()


def test_scores_need_not_be_contiguous() -> None:
    scores = random_scores(40, 16)
    for name in HOMES:
        choose(name)
        truth = cpu().route(scores, 4, normalize=True)
        for same in (scores.repeat(2, 1)[:, ::2], np.asfortranarray(scores)):
            assert_same(cpu().route(same, 4, normalize=True), truth)
    choose()


@pytest.mark.parametrize("name", HOMES)
def test_scores_that_cannot_be_routed_are_refused(name: str) -> None:
    choose(name)
    scores = random_scores(2, 4)
    for wrong, count in ((scores, 0), (scores, 5), (scores[0], 1), (scores.astype(float), 1)):
        with pytest.raises(OperandError, match=r"float32 \(T, experts\)"):
            cpu().route(wrong, count, normalize=False)
    choose()
