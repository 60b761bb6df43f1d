"""Scores that tell experts apart by rounding alone, and what a home chooses by them."""

from __future__ import annotations

import numpy as np

from shoal.kernels import Linears, Matrix
from shoal.kernels.arrays import Floats
from shoal.kernels.cpu_home import CpuHome

EXPERTS, COLUMNS, CHOSEN = 64, 2048, 8


def ties() -> tuple[Floats, Linears]:
    """Tokens that repeat themselves, and experts that are the same row, turned by whole repetitions: all scores of a
    token are equal but for rounding, so the order of a sum alone decides which experts it gets."""
    source = np.random.default_rng(7)
    period = COLUMNS // EXPERTS
    x = np.tile(source.standard_normal((40, period)), EXPERTS).astype(np.float32)
    row = source.standard_normal(COLUMNS).astype(np.float32)
    weights = np.array([np.roll(row, period * expert) for expert in range(EXPERTS)])
    return x, Linears((Matrix.of(weights),))


def choices(home: CpuHome, scores: Floats) -> tuple[list[int], list[int], bytes]:
    """Experts, their tokens and factors."""
    routing = home.route(scores, CHOSEN, True)
    return routing.used, routing.routes.tokens.tolist(), routing.routes.factors.tobytes()
