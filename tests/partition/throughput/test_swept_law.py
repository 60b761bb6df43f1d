"""What a layer's calls cost, by how long kernels compute in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.partition.throughput.profile import Overheads, SweptLaw


def test_what_computes_in_a_layer_makes_its_calls_cost_more() -> None:
    law = SweptLaw((1e-3, 2e-3, 8e-3), (4e-6, 18e-6, 70e-6))
    over = Overheads(layer_s=40e-6, swept=law)
    for ms, besides_us in (
        (0, 0),
        (0.5, 2),
        (1, 4),
        (1.5, 11),
        (5, 44),
        (8, 70),
        (16, 70 * 2**0.75),
        (99, 280),
    ):
        assert over.swept_s(ms * 1e-3) == pytest.approx(besides_us * 1e-6)


@given(st.lists(st.floats(0, 1e-2), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 1))
def test_more_computing_never_leaves_more_in_caches(layer_s: list[float], one: float, other: float) -> None:
    """Whatever was measured."""
    law = SweptLaw(tuple(1e-3 * (place + 1) for place in range(len(layer_s))), tuple(layer_s))
    less, more = (law.at(it) for it in sorted((one, other)))
    assert 0 <= less <= more * (1 + 1e-9)
    assert more <= 4 * max(layer_s) * (1 + 1e-9)
