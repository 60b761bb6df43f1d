"""A token goes to the best experts, among equals the lowest, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.kernels.routing import Routing, best, likeliest


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
