"""Norms and the scores of routers have the same bits in every home, so every machine chooses the same experts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes.homes import HOMES, NATIVE, frozen, layouts, randn
from fakes.near_ties import CHOSEN, choices, ties
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.random_weights import random_matrix

from shoal.kernels import WEIGHT_TYPES, Linears, Matrix, OperandError, WeightType
from shoal.kernels.arrays import Floats
from shoal.kernels.cpu_home import CpuHome
from shoal.kernels.homes import choose


@pytest.fixture(autouse=True)
def _chosen_again() -> object:
    yield
    choose()


def in_every_home(compute: object) -> list[bytes]:
    return [compute(choose(name)).tobytes() for name in HOMES]  # type: ignore[operator]


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 37])
def test_scores_of_every_type_have_the_same_bits(kind: WeightType, tokens: int) -> None:
    columns = 2 * kind.block_weights if kind.quantised else 100  # no whole lines of sixteen
    router = Linears((random_matrix(kind, 67, columns, offset_bytes=1),), (randn(67, seed=1),))
    x = randn(tokens, columns, seed=2)
    first, *others = in_every_home(lambda home: home.scores(x, router))
    assert len(first) == 4 * 67 * tokens
    assert all(other == first for other in others)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 20), st.integers(1, 70), st.integers(1, 130), st.integers(-20, 20), st.integers(0, 1 << 30)
)
def test_sizes_and_magnitudes_change_nothing(
    tokens: int, rows: int, columns: int, power: int, seed: int
) -> None:
    source = np.random.default_rng(seed)
    x = (source.standard_normal((tokens, columns)) * 10.0**power).astype(np.float32)
    weights = source.standard_normal((rows, columns)).astype(np.float32)
    norm = source.standard_normal(columns).astype(np.float32)
    router = Linears((Matrix.of(weights),))

    def compute(home: CpuHome) -> Floats:
        return np.concatenate([home.rms_norm(x, norm, 1e-6), home.scores(x, router)], axis=1)

    first, *others = in_every_home(compute)
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", HOMES)
def test_scores_are_right_and_a_row_depends_on_no_other(name: str) -> None:
    home = choose(name)
    x, weights, bias = randn(70, 300), randn(50, 300, seed=1), randn(50, seed=2)
    router = Linears((Matrix.of(weights),), (bias,))
    scores = home.scores(x, router)
    exact = x.astype(np.float64) @ weights.T + bias
    assert np.abs(scores - exact).max() <= 2e-5 * np.abs(exact).max()
    for rows in (1, 2, 33):
        assert np.array_equal(home.scores(x[:rows], router), scores[:rows])
    for same in layouts(x):
        assert np.array_equal(home.scores(same, router), scores)
    assert np.array_equal(home.scores(frozen(x), router), scores)
    with pytest.raises(OperandError):
        home.scores(x[:, 1:], router)


def test_ties_are_broken_alike_on_every_machine() -> None:
    x, router = ties()
    homes = [choose(name) for name in HOMES]
    first, *others = [choices(home, home.scores(x, router)) for home in homes]
    assert len(first[0]) > CHOSEN, "rounding decides"
    assert all(other == first for other in others)
    if len(NATIVE) > 2:  # a plain product of matrices breaks them otherwise
        assert len({str(choices(home, home.linears(x, router)[0])) for home in homes}) > 1


def test_processes_with_other_kernels_choose_the_same_experts() -> None:
    script = (
        f"import hashlib, sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from fakes.near_ties import choices, ties\n"
        "from shoal.kernels.homes import cpu\n"
        "x, router = ties(); home = cpu()\n"
        "print(home.name, hashlib.sha256(str(choices(home, home.scores(x, router))).encode()).hexdigest())"
    )
    found = {}
    for name in HOMES:
        environment = {**os.environ, "SHOAL_KERNELS": name}
        ran = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        served, found[name] = ran.stdout.split()
        assert served == name
    assert len(set(found.values())) == 1, found
