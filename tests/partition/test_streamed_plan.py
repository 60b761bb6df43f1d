"""Plans that stream are never over budget, stream no more with more memory and spread evenly; and what is refused."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.hardware_guesses import KV_SHARE
from shoal.partition.memory_layout import kv_page_bytes
from shoal.partition.plan import Misfit, Plan, Wanted
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, MoeSpec, RopeSpec
from shoal.partition.streamed_plan import PART_TOKENS, kv_has_room, plan_streamed

MB = 1 << 20


def spec(layers: int = 28, moe: MoeSpec | None = None) -> ModelSpec:
    return ModelSpec(
        family="llama",
        layers=(LayerSpec(moe=moe is not None),) * layers,
        hidden=3072,
        vocab=128256,
        context=8192,
        heads=24,
        kv_heads=8,
        head_dim=128,
        ffn=8192,
        ropes=(RopeSpec(128, 10000.0),),
        tied=True,
        moe=moe,
    )


def extents(
    model: ModelSpec, attn: int = 50 * MB, ffn: int = 151 * MB, slices: int = 12, expert: int = 3 * MB
) -> dict[BlockId, int]:
    sizes = {"embed": 0, "attn": attn, "ffn": ffn, "router": 2 * MB, "expert": expert}
    found = {block: sizes[block.kind] for block in model.blocks() if block.kind != "head"}
    return found | {BlockId("head", -1, number): 63 * MB for number in range(slices)}


def wanted(model: ModelSpec, **changes: object) -> Wanted:
    asked = Wanted(
        model,
        context_tokens=1024,
        kv_tokens=None,
        kv_type="f16",
        chunk_tokens=256,
        sequences=4,
        guesses=32,
        threads=2,
    )
    return asked._replace(**changes)  # type: ignore[arg-type]


def fitting(asked: Wanted, sizes: dict[BlockId, int], memory: int) -> Plan:
    made = plan_streamed(asked, sizes, MB, memory_bytes=memory)
    assert isinstance(made, Plan)
    return made


def plan(memory: int, model: ModelSpec | None = None, **changes: object) -> Plan:
    model = model or spec()
    return fitting(wanted(model, **changes), extents(model), memory)


def test_what_does_not_fit_streams_and_falls_in_a_line_to_nothing() -> None:
    model = spec()
    whole = sum(extents(model).values())
    budgets = [whole * tenth // 20 for tenth in range(3, 26)]
    made = [plan(memory) for memory in budgets]
    streamed = [p.streamed_bytes for p in made]
    assert streamed[-1] == 0 == made[-1].cyclic_bytes
    assert streamed[0] > whole * 0.8
    for (low, more), (high, less) in pairwise(zip(budgets, streamed, strict=True)):
        # most of every further byte goes to weights
        assert less <= more - 0.6 * (high - low) or less < 0.05 * whole
    for p, nbytes in zip(made, streamed, strict=True):
        assert p.peak_bytes <= budgets[made.index(p)]
        assert p.pinned_bytes + nbytes == whole


def test_whole_prompts_pass_together_and_a_block_takes_them_in_parts() -> None:
    made = plan(2160 * MB)
    assert made.streams
    assert made.chunk_tokens >= made.context_tokens
    assert PART_TOKENS[0] <= made.part_tokens <= PART_TOKENS[-1]
    assert made.window_bytes == (151 + 50) * MB  # the largest neighbours
    assert made.kv.tokens >= made.context_tokens
    assert "pass through a window of" in made.describe()
    assert f"{made.streamed_bytes / 2e9:.2g} s per token at 2 GB/s" in made.describe(2e9)


def test_pinned_blocks_lie_evenly() -> None:
    """Up to any place, the pinned share of a kind is as near to its share of all as whole blocks allow. Smaller blocks
    are pinned beside larger ones."""
    for memory in range(1400 * MB, 6000 * MB, 333 * MB):
        made = plan(memory)
        cyclic = [b for b in made.blocks if b.block.kind in ("attn", "ffn")]
        for kind in ("attn", "ffn"):
            of_kind = [b for b in cyclic if b.block.kind == kind]
            share = sum(b.tier == "ram" for b in of_kind) / len(of_kind)
            for place in range(len(of_kind)):
                off = sum(b.tier == "ram" for b in of_kind[:place]) - share * place
                assert abs(off) <= (1 if kind == "ffn" else 2)


def test_largest_streamed_blocks_are_no_neighbours_unless_the_window_holds_two() -> None:
    model = spec()
    sizes = extents(model) | {BlockId("ffn", 0): 160 * MB}
    for memory in range(1000 * MB, 6000 * MB, 222 * MB):
        made = fitting(wanted(model), sizes, memory)
        cycle = [b.nbytes for b in made.blocks if b.tier == "disk" and b.block.kind != "embed"]
        pairs = [one + next for one, next in zip(cycle, cycle[1:] + cycle[:1], strict=True)]
        assert made.window_bytes >= min(memory // 4, max(pairs, default=0)), memory


def test_experts_get_slots_after_everything_else_stays() -> None:
    model = spec(4, MoeSpec(64, 4, 1024, True))
    sizes = extents(model)
    made = fitting(wanted(model), sizes, 1600 * MB)
    dense = [b for b in made.blocks if b.block.kind not in ("expert", "embed")]
    assert all(b.tier == "ram" for b in dense)
    assert all(b.tier == "disk" for b in made.blocks if b.block.kind == "expert")
    assert 4 <= made.expert_slots < 256
    assert made.window_bytes == 0
    assert "experts" in made.describe()
    tight = fitting(wanted(model), sizes, 700 * MB)
    assert tight.expert_slots == 4
    assert tight.window_bytes > 0
    roomy = fitting(wanted(model), sizes, 4000 * MB)
    assert roomy.expert_slots == 256
    assert roomy.streamed_bytes == 0


def test_what_the_user_asked_for_wins() -> None:
    assert plan(2200 * MB, kv_tokens=1024).kv.tokens == 1024
    assert plan(2200 * MB, kv_type="i8").kv.nbytes <= plan(2200 * MB).kv.nbytes
    assert plan(2200 * MB, chunk_tokens=2048).chunk_tokens >= 2048


def test_below_the_least_it_says_the_least() -> None:
    model = spec()
    refused = plan_streamed(wanted(model), extents(model), MB, memory_bytes=200 * MB)
    assert isinstance(refused, Misfit)
    assert refused.plan.streams
    assert plan(refused.least_bytes) == refused.plan
    less = plan_streamed(wanted(model), extents(model), MB, memory_bytes=refused.least_bytes - MB)
    assert less == refused


models = st.builds(
    lambda layers, attn, ffn, slices, experts, expert: (
        model := spec(layers, MoeSpec(experts, min(2, experts), 512, True) if experts else None),
        extents(model, attn * 4096, ffn * 4096, slices, expert * 4096),
    ),
    st.integers(1, 12),
    st.integers(1, 9000),
    st.integers(1, 9000),
    st.integers(1, 5),
    st.integers(0, 9),
    st.integers(1, 900),
)


@settings(deadline=None, max_examples=40)
@given(
    models,
    st.lists(st.integers(50, 6000), min_size=2, max_size=6),
    st.integers(1, 16),
    st.sampled_from(["f16", "i8"]),
)
def test_never_over_budget_and_more_memory_never_streams_more(
    drawn: tuple[ModelSpec, dict[BlockId, int]], budgets: list[int], sequences: int, kv_type: str
) -> None:
    model, sizes = drawn
    asked = wanted(model, sequences=sequences, kv_type=kv_type, context_tokens=512)
    before: Plan | None = None
    for memory in sorted(budgets):
        made = plan_streamed(asked, sizes, MB, memory_bytes=memory * MB)
        if isinstance(made, Misfit):
            assert before is None, "what fits, fits in more memory"
            continue
        assert made.peak_bytes <= memory * MB
        streamed = [
            b.nbytes for b in made.blocks if b.tier == "disk" and b.block.kind not in ("embed", "expert")
        ]
        assert made.window_bytes >= max(streamed, default=0)
        assert made.chunk_tokens >= asked.chunk_tokens
        assert made.kv.tokens >= 512
        if before is not None:
            assert made.streamed_bytes <= before.streamed_bytes
            assert made.kv.pages >= before.kv.pages
            assert made.expert_slots >= before.expert_slots
        before = made


def test_a_context_has_room_where_its_pages_are_an_eighth_of_memory() -> None:
    """130 tokens take three pages; a byte less than eight times their bytes is too little."""
    model = spec()
    asked = wanted(model, context_tokens=130)
    enough = KV_SHARE * 3 * kv_page_bytes(model, asked.kv_type)
    assert kv_has_room(asked, enough)
    assert not kv_has_room(asked, enough - 1)
    assert not kv_has_room(wanted(model, context_tokens=193), enough)
