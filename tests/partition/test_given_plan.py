"""Plans that another machine made: whatever would take more memory than it says is refused.

That no honest plan is refused is tested where ranks' plans are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from shoal.partition.errors import PlanError
from shoal.partition.given_plan import check_given
from shoal.partition.plan import Plan, Wanted, plan_in_ram
from shoal.partition.slicing import divide, shard_spec
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, RopeSpec

WHOLE = ModelSpec(
    family="llama",
    layers=(LayerSpec(),) * 2,
    hidden=256,
    vocab=1000,
    context=1024,
    heads=8,
    kv_heads=4,
    head_dim=32,
    ffn=512,
    ropes=(RopeSpec(32, 10000.0),),
)
SPEC = shard_spec(WHOLE, divide(WHOLE, 2)[1])
SIZES = {block: 100_000 + 1000 * at for at, block in enumerate(SPEC.blocks())}
WANTED = Wanted(SPEC, 1024, 1024, "f16", 256, 4, 8, 2)


def honest() -> Plan:
    plan = plan_in_ram(WANTED, SIZES, memory_bytes=1 << 30)
    assert isinstance(plan, Plan)
    return plan


def with_kv(**changes: object) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, kv=replace(plan.kv, **changes))  # type: ignore[arg-type]


def with_blocks(**changes: object) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, blocks=tuple(replace(it, **changes) for it in plan.blocks))  # type: ignore[arg-type]


COUNTS = (
    "context_tokens",
    "chunk_tokens",
    "sequences",
    "guesses",
    "threads",
    "scratch_bytes",
    "part_tokens",
    "window_bytes",
    "expert_slots",
    "streamed_bytes",
    "ranks",
)

WRONG: dict[str, Callable[[Plan], Plan]] = {
    **{
        f"{name}={value}": partial(lambda name, value, plan: replace(plan, **{name: value}), name, value)
        for name in COUNTS
        for value in (-(1 << 60), -1, 1 << 60)
    },
    "no scratch": lambda plan: replace(plan, scratch_bytes=0),
    "longer steps than scratch allows": lambda plan: replace(plan, chunk_tokens=1 << 20),
    "more sequences than scratch allows": lambda plan: replace(plan, sequences=1 << 15),
    "no pages": with_kv(pages=0, nbytes=0),
    "pages below none": lambda plan: with_kv(pages=-5, nbytes=-5 * plan.kv.nbytes // plan.kv.pages)(plan),
    "more pages than bytes": lambda plan: with_kv(pages=2 * plan.kv.pages)(plan),
    "long pages": with_kv(page_tokens=1 << 20),
    "pages of nothing": with_kv(page_tokens=0),
    "no such type": with_kv(dtype="../f16"),
    "no blocks": lambda plan: replace(plan, blocks=()),
    "blocks twice": lambda plan: replace(plan, blocks=plan.blocks * 2),
    "another order": lambda plan: replace(plan, blocks=plan.blocks[::-1]),
    "another block": lambda plan: replace(
        plan, blocks=(*plan.blocks[:-1], replace(plan.blocks[0], block=BlockId("ffn", 99)))
    ),
    "blocks of no bytes": with_blocks(nbytes=0),
    "blocks below no bytes": with_blocks(nbytes=-(1 << 40)),
    "another device": with_blocks(device="cuda:0"),
    "another tier": with_blocks(tier="gpu"),
}


def test_an_honest_plan_is_taken() -> None:
    check_given(honest(), SPEC, SIZES.__getitem__)


@pytest.mark.parametrize("name", WRONG)
def test_no_figure_is_believed(name: str) -> None:
    with pytest.raises(PlanError):
        check_given(WRONG[name](honest()), SPEC, SIZES.__getitem__)
