"""Plans with a device: as many of the last layers as fit there, within both memories, whatever their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from shoal.partition.memory_layout import kv_page_bytes, lent_pages
from shoal.partition.placement import (
    DeviceRoom,
    ModelBytes,
    NoRoomThere,
    device_scratch_bytes,
    plan_on_device,
)
from shoal.partition.plan import BlockPlan, Misfit, Plan, Wanted
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, MoeSpec, RopeSpec
from shoal.partition.throughput.placing.passing_plans import plan_passing

SPEC = ModelSpec(
    family="llama", layers=(LayerSpec(),) * 6, hidden=256, vocab=1000, context=4096, heads=8, kv_heads=2, head_dim=32,
    ffn=512, ropes=(RopeSpec(32, 10000.0),),
)  # fmt: skip
MIXTURE = replace(
    SPEC,
    layers=(LayerSpec(moe=True),) * 6,
    moe=MoeSpec(experts=4, active=2, ffn=128, normalize=True),
)
WANTED = Wanted(
    SPEC,
    context_tokens=512,
    kv_tokens=None,
    kv_type="f16",
    chunk_tokens=64,
    sequences=4,
    guesses=8,
    threads=2,
)
MB = 1 << 20
SCRATCH, MIXED_SCRATCH = (
    device_scratch_bytes(WANTED._replace(spec=spec), DeviceRoom("sim:x", 0, 0, False, 0))
    for spec in (SPEC, MIXTURE)
)


def plan(device_bytes: int, memory_bytes: int = 1 << 33, spec: ModelSpec = SPEC, **changes: Any) -> Any:
    blocks = dict.fromkeys(spec.blocks(), MB)
    blocks[BlockId("head")] = 5 * MB
    tied = changes.pop("tied", 0)
    staged_tokens = changes.pop("staged_tokens", 0)
    room = DeviceRoom("sim:x", device_bytes, 0, False, device_bytes)
    wanted = WANTED._replace(spec=spec, **changes)
    return plan_on_device(
        [wanted], ModelBytes(blocks, tied, 0), room, memory_bytes=memory_bytes, staged_tokens=staged_tokens
    )


def there(made: Plan) -> list[str]:
    blocks = [it.block for it in made.blocks if it.tier == "gpu"]
    return [block.kind if block.kind == "head" else f"{block.kind}.{block.layer}" for block in blocks]


def test_the_last_layers_go_there_behind_the_head() -> None:
    made = plan(SCRATCH + 10 * MB)
    assert there(made) == ["attn.4", "ffn.4", "attn.5", "ffn.5", "head"]
    assert (made.device, made.device_layers) == ("sim:x", (2, 6))
    assert made.placed.startswith(
        "2 of 6 layers (the last) and the head on sim:x with 9.44 MB of weights and "
    )


def test_a_head_that_takes_the_place_of_more_than_it_weighs_stays() -> None:
    assert there(plan(SCRATCH + 5 * MB)) == ["attn.4", "ffn.4", "attn.5", "ffn.5"]


def test_all_of_it() -> None:
    made = plan(1 << 30)
    assert "embed" not in there(made)
    assert len(there(made)) == 13
    assert made.kv.pages == 4 * 8  # every sequence gets a full context
    assert made.device_kv_bytes == made.kv.nbytes
    assert made.peak_bytes < 80 * MB


def test_a_tied_head_is_there_twice() -> None:
    made = plan(1 << 30, tied=5 * MB)
    sizes = {str(it.block): it.nbytes for it in made.blocks}
    assert sizes["embed"] == 5 * MB
    assert sizes["head"] == 5 * MB + 4 * SPEC.hidden


def test_of_a_mixture_experts_go_there_last() -> None:
    """4 MB of experts in each of 6 layers, and 2 MB besides; a page of KV is a megabyte at most."""
    whole = [f"{kind}.{layer}" for layer in range(6) for kind in ("attn", "router")]
    found = {
        megabytes: plan(MIXED_SCRATCH + megabytes * MB, spec=MIXTURE) for megabytes in (8, 18, 22, 30, 60)
    }
    assert there(found[8]) == [*whole[-2:], "head"]
    assert found[8].placed.startswith("1 of 6 layers (the last, without experts) and the head on sim:x with ")
    assert there(found[18]) == [*whole, "head"]
    assert found[18].placed.startswith("all 6 layers (without experts) and the head on sim:x with ")
    assert set(there(found[22])) == {*whole, "expert.5", "head"}
    assert found[22].device_experts == (4, 24)
    assert found[30].placed.startswith("all 6 layers (12 of 24 experts) and the head on sim:x with ")
    assert found[60].device_whole
    assert not found[30].device_whole


def test_experts_come_through_what_whole_layers_leave() -> None:
    found = {
        megabytes: plan(MIXED_SCRATCH + megabytes * MB, spec=MIXTURE, staged_tokens=40)
        for megabytes in range(8, 50)
    }
    for made in found.values():
        without = plan(made.device_bytes, spec=MIXTURE, staged_tokens=0)
        given_up = without.device_experts[0] - made.device_experts[0]
        assert given_up in (0, 4)  # a layer's at most
        assert 0 < made.staged_experts <= 4 or made.device_whole or not made.device_experts[0]
    assert "(others come for steps of 40 tokens or more)" in found[30].placed
    assert {made.staged_experts for made in found.values()} >= {0, 1, 2}
    partly = found[12]  # not even the dense part of all layers
    assert partly.device_layers[0] < 6
    assert partly.staged_tokens == (40 if partly.staged_experts else 0)


def test_dense_layers_come_in_the_place_of_three_at_most() -> None:
    for megabytes in range(6, 40):
        device_bytes = SCRATCH + megabytes * MB
        without, coming = plan(device_bytes), plan(device_bytes, staged_tokens=40)
        if not coming.staged_tokens:  # all layers are there, or none would be
            assert coming == without
            continue
        assert (coming.staged_experts, coming.staged_tokens) == (0, 40)
        assert coming.passing_bytes == 4 * (MB + 5 * 256)  # attention and feed-forward, twice each
        assert 0 < without.device_weights_bytes - coming.device_weights_bytes <= 6 * MB
        assert "(others come for steps of 40 tokens or more)" in coming.placed
    assert plan(SCRATCH + 12 * MB, staged_tokens=40).staged_tokens
    assert not plan(1 << 30, staged_tokens=40).staged_tokens


@given(st.integers(1, 40 * MB), st.integers(1, 80 * MB), st.booleans())
@example(
    7 * MB, 1 << 33, False
)  # nothing can come with the longer context, and with the shorter one two layers stay
def test_where_no_dense_layer_comes_the_plan_is_as_if_none_should(
    device_bytes: int, memory_bytes: int, full: bool
) -> None:
    """Also with several contexts, of which some let layers come and others do not."""
    blocks = dict.fromkeys(SPEC.blocks(), MB)
    device_bytes += SCRATCH
    room = DeviceRoom("sim:x", device_bytes, 0, False, device_bytes)
    contexts = [
        WANTED._replace(context_tokens=tokens, kv_tokens=None if full else tokens) for tokens in (4096, 512)
    ]
    coming, without = (
        plan_on_device(
            contexts, ModelBytes(blocks, 0, 0), room, memory_bytes=memory_bytes, staged_tokens=tokens
        )
        for tokens in (40, 0)
    )
    if isinstance(coming, Plan) and coming.staged_tokens:
        assert isinstance(without, Plan)
    else:
        assert coming == without


def test_no_layer_makes_room_for_experts_to_come_that_has_none_here() -> None:
    device_bytes = MIXED_SCRATCH + 30 * MB
    asked = {"spec": MIXTURE, "kv_tokens": 512}
    without = plan(device_bytes, **asked)
    coming = plan(device_bytes, staged_tokens=40, **asked)
    assert coming.device_experts[0] < without.device_experts[0]
    found = plan(device_bytes, coming.peak_bytes - 1, staged_tokens=40, **asked)
    assert found == without


def passing(device_bytes: int, memory_bytes: int = 1 << 33, spec: ModelSpec = MIXTURE, **changes: Any) -> Any:
    blocks = dict.fromkeys(spec.blocks(), MB) | {BlockId("head"): 5 * MB}
    room = DeviceRoom("sim:x", device_bytes, 0, False, device_bytes)
    sizes, attending_rows = ModelBytes(blocks, changes.pop("tied", 0), 0), changes.pop("attending_rows", 0)
    wanted = WANTED._replace(spec=spec, **changes)
    return plan_passing(
        [wanted],
        sizes,
        room,
        memory_bytes=memory_bytes,
        vectors_bytes=MB,
        attending_rows=attending_rows,
    )


@given(st.integers(1, 60 * MB))
def test_texts_attend_there_if_there_is_room(device_bytes: int) -> None:
    plain, attending = (passing(device_bytes, attending_rows=rows) for rows in (0, 32))
    if isinstance(attending, NoRoomThere):
        assert attending.least_bytes > device_bytes
        assert isinstance(passing(attending.least_bytes, attending_rows=32), Plan)
        return
    assert attending.device_bytes <= device_bytes
    # Pages of a layer for both groups, and what is found there.
    more = 2 * lent_pages(512, 64) * (2 * 2 * 32 * 64 * 2) + 4 * (64 + 4 + 8) * 8 * 32
    assert attending.device_scratch_bytes == plain.device_scratch_bytes + more
    # One page for all rows, and two for each of two texts with as many.
    assert attending.scratch_bytes == plain.scratch_bytes + (1 + 2 * 2) * (2 * 2 * 32 * 64 * 2)
    assert "while the cpu attends (but for texts of 32 tokens or more in a step)" in attending.placed


def test_scores_of_long_steps_take_no_more_than_some_rows_have() -> None:
    room = DeviceRoom("sim:x", 0, 0, True, 0)

    def of_attention(chunk: int, context: int) -> int:
        wanted = WANTED._replace(chunk_tokens=chunk, context_tokens=context)
        both = (device_scratch_bytes(wanted, room._replace(gathers=its)) for its in (True, False))
        return next(both) - next(both)

    assert of_attention(256, 8192) < of_attention(512, 8192) == of_attention(4096, 8192)
    # A row has all of its scores, however long the context.
    assert of_attention(1, 1 << 24) == of_attention(4096, 1 << 24)


@given(st.integers(1, 60 * MB), st.integers(1, 120 * MB), st.sampled_from([SPEC, MIXTURE]), st.booleans())
def test_weights_pass_within_both_memories(
    device_bytes: int, memory_bytes: int, spec: ModelSpec, tied: bool
) -> None:
    changes = {"spec": spec, "tied": 5 * MB if tied else 0}
    made = passing(device_bytes, memory_bytes, **changes)
    if isinstance(made, NoRoomThere):
        assert made.least_bytes > device_bytes
        assert isinstance(passing(made.least_bytes, **changes), Plan)
        return
    if isinstance(made, Misfit):
        assert made.least_bytes > memory_bytes
        assert isinstance(passing(device_bytes, made.least_bytes, **changes), Plan)
        return
    assert made.passes
    assert made.device_bytes <= device_bytes
    assert made.peak_bytes <= memory_bytes
    assert made.device_kv_bytes == 0  # the CPU attends
    assert made.passing_bytes > 2 * 2 * MB
    kept = {it.block for it in made.blocks if it.tier == "gpu"}
    assert BlockId("head") in kept
    assert all(block.kind in ("head", "expert") for block in kept)
    experts = sorted({block.expert for block in kept if block.kind == "expert"})
    assert len(kept) == 1 + 6 * len(experts)  # of every layer the same
    assert experts == [*range(4 - len(experts), 4)]
    more = passing(device_bytes + 30 * MB, memory_bytes, **changes)
    assert more.device_weights_bytes >= made.device_weights_bytes


def test_all_experts_of_a_layer_are_in_one_place() -> None:
    made = plan(MIXED_SCRATCH + 30 * MB, spec=MIXTURE)
    assert made.device_layers == (6, 6)
    assert len(there(made)) == 6 * 2 + 3 * 4 + 1
    assert {it.block.layer for it in made.blocks if it.block.kind == "expert" and it.tier == "gpu"} == {
        3,
        4,
        5,
    }


def test_a_long_context_takes_the_place_of_few_layers() -> None:
    contexts = [WANTED._replace(context_tokens=tokens) for tokens in (4096, 2048, 1024, 512)]
    blocks = ModelBytes(dict.fromkeys(SPEC.blocks(), MB), 0, 0)
    chosen = []
    for megabytes in (64, 16, 8, 5):
        room = DeviceRoom("sim:x", SCRATCH + megabytes * MB, 0, False, 64 * MB)
        made = plan_on_device(contexts, blocks, room, memory_bytes=1 << 33)
        assert isinstance(made, Plan)
        chosen.append((made.context_tokens, made.device_layers[0]))
        shortest = plan_on_device(contexts[-1:], blocks, room, memory_bytes=1 << 33)
        assert isinstance(shortest, Plan)
        assert made.device_layers[0] >= 0.9 * shortest.device_layers[0]
    assert chosen[0] == (4096, 6)
    assert [context for context, _ in chosen] == sorted((context for context, _ in chosen), reverse=True)
    assert chosen[-1][0] < 4096


def test_what_lacks() -> None:
    made = plan(SCRATCH)
    assert isinstance(made, NoRoomThere)
    assert isinstance(plan(made.least_bytes), Plan)
    assert isinstance(plan(made.least_bytes - 1), NoRoomThere)
    misfit = plan(SCRATCH + 10 * MB, memory_bytes=10 * MB)
    assert isinstance(misfit, Misfit)
    assert isinstance(plan(SCRATCH + 10 * MB, memory_bytes=misfit.least_bytes), Plan)
    assert isinstance(plan(SCRATCH + 10 * MB, memory_bytes=misfit.least_bytes - 1), Misfit)


@given(
    st.integers(0, 64 * MB),
    st.integers(0, 128 * MB),
    st.sampled_from([None, 640]),
    st.sampled_from([SPEC, MIXTURE]),
    st.sampled_from([0, 40]),
)
@example(25 * MB, 128 * MB, None, MIXTURE, 40)
def test_budgets_hold(
    device: int, memory: int, kv_tokens: int | None, spec: ModelSpec, staged_tokens: int
) -> None:
    made = plan(device, memory, spec, kv_tokens=kv_tokens, staged_tokens=staged_tokens)
    if not isinstance(made, Plan):
        return
    assert made.device_bytes <= device
    assert made.staging_bytes == 2 * made.staged_experts * (MB + 5 * 256)
    assert made.staged_tokens == (staged_tokens if made.staged_experts else 0)
    if made.device_whole or not made.staged_tokens:
        assert made.staging_bytes == 0
    assert made.peak_bytes <= memory
    assert made.kv.nbytes == made.kv.pages * kv_page_bytes(spec, "f16")
    assert made.kv.tokens >= (kv_tokens or 512)
    more = plan(device + 8 * MB, memory + 64 * MB, spec, kv_tokens=kv_tokens, staged_tokens=staged_tokens)
    assert more.device_layers >= made.device_layers
    assert more.device_experts >= made.device_experts


def test_steps_do_not_look_through_all_blocks() -> None:
    """A mixture has thousands, and every step asks whether any pass."""
    looks = []

    class Counted(tuple[BlockPlan, ...]):
        def __iter__(self) -> Iterator[BlockPlan]:
            looks.append(self)
            return super().__iter__()

    made = plan(1 << 33)
    made = replace(made, blocks=Counted(made.blocks))
    for _ in range(3):
        assert (made.passes, made.rows_together(100)) == (False, made.part_tokens)
    assert len(looks) == 1
    passing = replace(made, blocks=tuple(replace(it, tier="ram") for it in made.blocks))
    assert (passing.passes, passing.rows_together(100)) == (True, 50)
