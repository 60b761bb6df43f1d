"""How many experts several tokens choose, by how often each was used."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes.throughput.throughput_cases import device, spec, wanted, weighed
from hypothesis import given
from hypothesis import strategies as st

from shoal.partition.plan import Plan, plan_in_ram
from shoal.partition.spec import MoeSpec
from shoal.partition.throughput.cost import cost
from shoal.partition.throughput.laws import chosen_by, distinct_experts, token_chances
from shoal.partition.throughput.prediction import Job

_skews = st.lists(st.floats(0.01, 1.0), min_size=8, max_size=64)
_rows = st.integers(1, 512)


def of_a_token(weights: list[float], active: int = 2) -> list[float]:
    """Chances that come to `active`, none of them above 1."""
    even = active / len(weights)
    most = max(weights) - sum(weights) / len(weights)
    room = min(1.0, (1 - even) / most) if most > 0 else 0.0
    mean = sum(weights) / len(weights)
    scale = min(room, even / mean)
    return [even + scale * (it - mean) for it in weights]


@given(_skews, _rows)
def test_choices_are_at_least_a_tokens_and_at_most_all(weights: list[float], rows: int) -> None:
    chances = of_a_token(weights)
    found = chosen_by(chances, rows)
    assert 2 - 1e-9 <= found <= len(weights)
    assert chosen_by(chances, rows + 1) >= found
    uniform = distinct_experts(len(weights), 2, rows, 1.0)
    assert found <= uniform + 1e-9, "uneven chances choose fewer"
    assert chosen_by([2 / len(weights)] * len(weights), rows) == pytest.approx(uniform)


def test_skew_chooses_fewer() -> None:
    few, many = [0.9, 0.9, *[0.2 / 14] * 14], [2 / 16] * 16
    assert chosen_by(few, 8) < 0.7 * chosen_by(many, 8)


@given(_skews, st.integers(1, 4))
def test_chances_are_found_whatever_rows_parts_had(weights: list[float], rows: int) -> None:
    chances = of_a_token(weights)
    shares = [1 - (1 - it) ** rows for it in chances]
    found = token_chances(shares, 2)
    if sum(shares) > len(shares) / 2:
        assert found is None
    elif found is not None:  # to the last bit there may be less than `active`
        assert found == pytest.approx(chances, abs=1e-6)


def test_what_was_counted_counts_in_predictions() -> None:
    model = weighed(spec(6, moe=MoeSpec(16, 2, 512, True), ffn=0))
    plan = plan_in_ram(wanted(model.spec, sequences=8), model.block_bytes, memory_bytes=10**12)
    assert isinstance(plan, Plan)

    def token_s(*chances: float, distinct: float | None = None) -> float:
        its = replace(model, chances=(chances,) if chances else ())
        return cost(its, plan, device(), Job(64, 16, 8, distinct=distinct)).token_s

    even, skewed = [2 / 16] * 16, [0.9, 0.9, *[0.2 / 14] * 14]
    assert token_s(*even) == pytest.approx(token_s(distinct=1.0))
    assert token_s(*skewed) < token_s() < token_s(*even)
    assert token_s(*skewed, distinct=1.0) == token_s(distinct=1.0), "what is given counts"
