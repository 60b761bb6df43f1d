"""What a home keeps with operands is its own: other homes can compute with the same operands before and after it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from fakes.homes import NATIVE, TRUTH, ones, randn, zeros
from inputs.random_weights import random_matrix

from shoal.kernels import FeedForward, Linears, Routes
from shoal.kernels.arrays import Floats
from shoal.kernels.attention_operands import KvPages, Rotation, Scoring, Segments, kv_layout
from shoal.kernels.cpu_home import CpuHome
from shoal.kernels.homes import choose
from shoal.kernels.native_library import Native
from shoal.kernels.types import Q4_K, Q6_K


@pytest.fixture(autouse=True)
def _best_home_afterwards() -> Iterator[None]:
    yield
    choose()


class Operands:
    """One operand of each kind that homes prepare."""

    def __init__(self) -> None:
        gate, up, down = (random_matrix(Q4_K, 256, 256, seed=i, scale=2e-4) for i in range(3))
        self.linears = Linears((gate, random_matrix(Q6_K, 40, 256, scale=2e-4)), (randn(256), None))
        self.layer = FeedForward(Linears((gate, up)), Linears((down,)), "silu")
        layout = kv_layout("f16", 16)
        self.kv = KvPages(layout, 4, np.zeros((2, 2, layout.head_bytes), np.uint8))
        self.segments = Segments.build([(5, 0, [1])])
        angles = randn(5, 8)
        self.rotation = Rotation(16, False, np.cos(angles), np.sin(angles))

    def results(self, home: CpuHome) -> list[Floats]:
        x, q, k, v = randn(5, 256), randn(5, 64), randn(5, 32, seed=1), randn(5, 32, seed=2)
        mixed = zeros(5, 256)
        home.experts(x, [self.layer], Routes((0, 2), np.array([1, 4]), ones(2)), mixed)
        seen = home.attention(self.kv, self.segments, q, k, v, Scoring(self.rotation, 0.3))
        fed = home.feed_forward(x, self.layer, ones(256), 1e-5)
        return [*home.linears(x, self.linears), fed, mixed, seen, home.rms_norm(x, ones(256), 1e-5)]


def test_homes_take_turns_with_the_same_operands() -> None:
    homes: list[CpuHome] = [TRUTH, *map(Native, NATIVE)]
    homes.append(Native(NATIVE[0]))  # another of the same kernels
    alone = [Operands().results(home) for home in homes]
    shared = Operands()
    for home, expected in [*zip(homes, alone, strict=True), *zip(homes[::-1], alone[::-1], strict=True)]:
        got = shared.results(home)
        assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True)), home.name
    for one, other in pairwise(alone):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_new_home_takes_nothing_from_the_one_in_use() -> None:
    """The library computes in one home at a time, and making another home switches it."""
    for first, second in [*pairwise(NATIVE), *pairwise(NATIVE[::-1])]:
        home, x = Native(first), randn(1, 256)
        before = home.rms_norm(x, ones(256), 1e-5)
        Native(second)
        assert np.array_equal(home.rms_norm(x, ones(256), 1e-5), before)
