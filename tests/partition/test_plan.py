"""Plans: what they add up to, how KV shares memory, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shoal.partition.errors import PlanError
from shoal.partition.memory_layout import PAGE_TOKENS, kv_page_bytes
from shoal.partition.plan import Plan, Wanted, plan_in_ram, scratch_bytes
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


def plan(memory_bytes: int = 1 << 30, **changes: Any) -> Plan:
    return plan_in_ram(
        WANTED._replace(**changes), dict.fromkeys(SPEC.blocks(), BLOCK_BYTES), memory_bytes=memory_bytes
    )


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
    with pytest.raises(PlanError, match=f"needs {(fixed + one) / 1e6:,.0f} MB .* 1,024 tokens of KV"):
        plan(fixed + one - 1)


def test_kv_asked_for_is_kv_planned() -> None:
    assert plan(kv_tokens=100).kv.tokens == 2 * PAGE_TOKENS
    with pytest.raises(PlanError, match="6,400,000 tokens of KV"):
        plan(kv_tokens=6_400_000)


@pytest.mark.parametrize("field", ["hidden", "vocab", "ffn", "kv_heads"])
def test_scratch_grows_with_the_model_and_the_step(field: str) -> None:
    larger = replace(SPEC, **{field: 2 * getattr(SPEC, field)})
    for native in (True, False):
        wanted = WANTED._replace(native=native)
        least = scratch_bytes(wanted)
        for name in ("context_tokens", "chunk_tokens", "sequences", "guesses", "threads"):
            assert scratch_bytes(wanted._replace(**{name: 2 * getattr(wanted, name)})) > least
        assert scratch_bytes(wanted._replace(spec=larger)) > least
