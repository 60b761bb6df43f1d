"""Offline batches: where computing catches up with bringing weights, and what memory allows, as worked out by hand."""

from __future__ import annotations

import pytest

from shoal.partition.throughput.offline import (
    Hybrid,
    expected,
    saturating_tokens,
    tokens_per_kv,
    upper_bound,
)

# Mixtral-8x7B: 46.7e9 weights in bf16, 12.9e9 of them active; 128 KiB of K and V a token.
MIXTRAL = Hybrid(93.4e9, 25.8e9, 131072, 150e12, 32e9, 100e9, 200e9)


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


def test_memory_or_computing_bounds_the_first_stage() -> None:
    tokens = MIXTRAL.kv_tokens * tokens_per_kv(512, 128) / MIXTRAL.pass_s
    assert upper_bound(MIXTRAL, 512, 128) == pytest.approx(tokens * 128 / 640)
    roomy = MIXTRAL._replace(kv_bytes=1e15)
    assert upper_bound(roomy, 512, 128) == pytest.approx(150e12 / 25.8e9 * 128 / 640)


def test_the_second_stage_comes_near_the_first_with_many_requests_and_never_beyond() -> None:
    bound = upper_bound(MIXTRAL, 512, 128)
    found = [expected(MIXTRAL, 512, 128, requests) for requests in (10, 1000, 10_000, 1_000_000)]
    assert found == sorted(found)
    assert 0.9 * bound < found[-1] <= bound


def test_attention_on_the_host_can_bind() -> None:
    slow = MIXTRAL._replace(memory_bytes_per_s=10e9)
    assert expected(slow, 512, 128, 10_000) < 0.5 * expected(MIXTRAL, 512, 128, 10_000)
