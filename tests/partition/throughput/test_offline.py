"""Offline batches: where computing catches up with bringing weights, and what memory allows, as worked out by hand."""

from __future__ import annotations

import pytest

from shoal.partition.throughput.offline import (
    Hybrid,
    saturating_tokens,
    tokens_per_kv,
    upper_bound,
)

# Mixtral-8x7B: 46.7e9 weights in bf16, 12.9e9 of them active; 128 KiB of K and V a token.
MIXTRAL = Hybrid(93.4e9, 25.8e9, 131072, 150e12, 32e9, 100e9)


@pytest.mark.parametrize(
    ("flops", "tokens", "printed"),
    [(150e12, 18_750, 19_200), (181e12, 22_625, 23_200), (312e12, 39_000, 40_000)],
)
def test_the_published_saturation_points(flops: float, tokens: int, printed: int) -> None:
    """A40, L40 and A100 behind 32 GB/s. The paper's figures have units of 1024 somewhere."""
    found = saturating_tokens(flops, 32e9, experts=8, active=2)
    assert found == tokens
    assert found * 1.024 == pytest.approx(printed, rel=2e-3)


def test_a_request_holds_its_prompt_and_half_of_its_answer() -> None:
    """p = 100, g = 3: it holds 101, 102 and 103 tokens, while 103 are computed."""
    assert tokens_per_kv(100, 3) == pytest.approx(103 / (101 + 102 + 103))


def test_memory_or_computing_bounds_all_schedules() -> None:
    tokens = MIXTRAL.kv_tokens * tokens_per_kv(512, 128) / MIXTRAL.pass_s
    assert upper_bound(MIXTRAL, 512, 128) == pytest.approx(tokens * 128 / 640)
    roomy = MIXTRAL._replace(kv_bytes=1e15)
    assert upper_bound(roomy, 512, 128) == pytest.approx(150e12 / 25.8e9 * 128 / 640)
