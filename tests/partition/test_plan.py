"""Plans: what they add up to, how KV shares memory, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shoal.partition.memory_layout import PAGE_TOKENS, kv_page_bytes
from shoal.partition.plan import (
    Misfit,
    Plan,
    Wanted,
    first_fit,
    least_in_ram,
    plan_in_ram,
    scratch_bytes,
)
from shoal.partition.spec import LayerSpec, ModelSpec, RopeSpec

SPEC = ModelSpec(
    family="llama",
    layers=(LayerSpec(),) * 4,
    hidden=256,
    vocab=1000,
    context=4096,
    heads=8,
    kv_heads=2,
    head_dim=32,
    ffn=512,
    ropes=(RopeSpec(32, 10000.0),),
)
BLOCK_BYTES = 1 << 20
WANTED = Wanted(
    SPEC,
    context_tokens=1000,
    kv_tokens=None,
    kv_type="f16",
    chunk_tokens=128,
    sequences=4,
    guesses=8,
    threads=2,
)


BLOCKS = dict.fromkeys(SPEC.blocks(), BLOCK_BYTES)


def plan(memory_bytes: int = 1 << 30, **changes: Any) -> Plan:
    made = plan_in_ram(WANTED._replace(**changes), BLOCKS, memory_bytes=memory_bytes)
    assert isinstance(made, Plan)
    return made


def misfit(memory_bytes: int = 1 << 30, **changes: Any) -> Misfit:
    made = plan_in_ram(WANTED._replace(**changes), BLOCKS, memory_bytes=memory_bytes)
    assert isinstance(made, Misfit)
    return made


def test_the_peak_is_weights_kv_and_scratch() -> None:
    made = plan()
    assert made.weights_bytes == len(SPEC.blocks()) * BLOCK_BYTES
    assert made.kv.tokens == 4 * 1024
    assert made.kv.nbytes == made.kv.pages * kv_page_bytes(SPEC, "f16")
    assert made.peak_bytes == made.weights_bytes + made.kv.nbytes + made.scratch_bytes


def test_kv_takes_half_of_what_is_left_but_one_context_at_least() -> None:
    full = plan()
    one = 1024 // PAGE_TOKENS * kv_page_bytes(SPEC, "f16")
    fixed = full.weights_bytes + full.scratch_bytes
    assert plan(fixed + 6 * one).kv.nbytes == 3 * one
    assert plan(fixed + one).kv.nbytes == one
    least = misfit(fixed + one - 1)
    assert least == misfit(0)
    assert (least.least_bytes, least.plan.kv.tokens) == (fixed + one, 1024)
    assert least.plan == plan(fixed + one) == least_in_ram(WANTED, BLOCKS)


def test_kv_asked_for_is_kv_planned() -> None:
    assert plan(kv_tokens=100).kv.tokens == 2 * PAGE_TOKENS
    assert misfit(kv_tokens=6_400_000).plan.kv.tokens == 6_400_000


def test_of_what_is_tried_the_first_that_fits_is_taken_or_what_lacks_least() -> None:
    made, large, small = plan(), misfit(0), misfit(0, context_tokens=64)
    untried = iter([large, made, small])
    assert first_fit(untried) is made
    assert next(untried) is small
    assert first_fit([large, small, large]) is small


@pytest.mark.parametrize("field", ["hidden", "vocab", "ffn", "kv_heads"])
def test_scratch_grows_with_the_model_and_the_step(field: str) -> None:
    larger = replace(SPEC, **{field: 2 * getattr(SPEC, field)})
    for native in (True, False):
        wanted = WANTED._replace(native=native)
        least = scratch_bytes(wanted)
        for name in ("context_tokens", "chunk_tokens", "sequences", "guesses", "threads"):
            assert scratch_bytes(wanted._replace(**{name: 2 * getattr(wanted, name)})) > least
        assert scratch_bytes(wanted._replace(spec=larger)) > least
