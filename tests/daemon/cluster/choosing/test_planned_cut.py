"""A model cut as it was chosen has plans that fit, and agree where ranks must; for prompts only, rank 0 has two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from fakes import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.daemon.cluster.choosing.planned_cut import PlannedCut, TooTight, planned_cut
from shoal.daemon.config import NodeConfig
from shoal.daemon.loading.budgeting import disk_buffer_bytes
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.partition.given_plan import check_given
from shoal.partition.group_choice import Choice, RankPlan, Split
from shoal.partition.group_cost import Figures
from shoal.partition.memory_layout import arena_slack
from shoal.partition.plan import Plan, scratch_bytes, wanted_by
from shoal.partition.slicing import cut_rows
from shoal.partition.sum_cost import Means

CONFIG = NodeConfig(max_sequences=4, chunk_tokens=64, kv_type="f16", kv_disk_bytes=0)
STAR = Means("star", "f32")
ROOM = 1 << 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    model = tiny.hf_model(
        "qwen3", seed=11, hidden_size=256, intermediate_size=1024, max_position_embeddings=4096
    )
    path = tiny.save_gguf(model, tmp_path_factory.mktemp("m") / "tiny.gguf", type="F16")
    with open_checkpoint(path) as opened:
        yield opened


def choice(split: Split) -> Choice:
    ranks = tuple(RankPlan(f"m{place}", place, 0.5, 1, 0, 0.0) for place in range(2))
    figures = Figures(0.1, (1.0,), 2.0, None, STAR, 64, overlap_rows=40, group_rows=32, page_rows=3)
    return Choice(split, ranks, (1, 1), "columns", figures, (512,), 2)


def cut(checkpoint: Checkpoint, split: Split, head: int = ROOM, worker: int = ROOM) -> PlannedCut:
    return planned_cut(checkpoint, CONFIG, choice(split), [head, worker], [2, 3])


def both(made: PlannedCut) -> list[Plan]:
    assert not isinstance(made.plans, TooTight), made.plans
    return [*made.plans]


def test_rank_0_has_the_whole_model_and_its_share(checkpoint: Checkpoint) -> None:
    made = cut(checkpoint, "prompts")
    whole, worker = both(made)
    own, _ = both(cut(checkpoint, "tensor"))
    share = made.share
    assert share is not None
    assert [it.block for it in whole.blocks] == [*checkpoint.spec.blocks()]
    layers = [it for it in own.blocks if it.block.kind not in ("embed", "head")]
    assert [*share.blocks] == layers
    assert share.peak_bytes == pytest.approx(share.weights_bytes, rel=0.02)
    assert (whole.ranks, share.ranks, worker.ranks) == (1, 2, 2)
    for plan in (share, worker):
        assert (plan.overlap_rows, plan.group_rows, plan.page_rows) == (40, 32, 3)
        assert (plan.kv.pages, plan.chunk_tokens, plan.context_tokens) == (
            whole.kv.pages,
            whole.chunk_tokens,
            whole.context_tokens,
        )
    assert (whole.threads, worker.threads) == (2, 3)
    assert (made.parts[1].spec.vocab, worker.kv.nbytes) == (0, whole.kv.nbytes // 2)


def test_the_tightest_decides_and_nothing_streams(checkpoint: Checkpoint) -> None:
    roomy, _ = both(cut(checkpoint, "prompts"))
    least = replace(roomy, kv=replace(roomy.kv, nbytes=0)).peak_bytes + 1_200_000
    seen = set()
    for head in range(least, least + 12_000_000, 1_000_000):
        made = cut(checkpoint, "prompts", head)
        if isinstance(made.plans, TooTight):
            assert made.plans.rank == 0
            continue
        whole, worker = both(made)
        assert made.share is not None
        assert whole.peak_bytes + made.share.peak_bytes + disk_buffer_bytes(checkpoint, CONFIG) <= head
        assert not whole.streams
        assert not worker.streams
        assert worker.kv.pages == whole.kv.pages
        seen.add(whole.kv.pages)
    assert len(seen) > 1
    small = cut(checkpoint, "prompts", ROOM, 8_000_000)
    assert isinstance(small.plans, TooTight)
    assert small.plans.rank == 1
    assert small.streamed_bytes > 0


def test_a_worker_with_little_room_copies_what_it_can(checkpoint: Checkpoint) -> None:
    """Context and pages of the head are what they are beside the roomiest worker."""
    whole, _ = both(cut(checkpoint, "prompts"))
    tight = cut(checkpoint, "prompts", ROOM, 8_000_000).plans
    assert isinstance(tight, TooTight)
    seen = set()
    for room in range(tight.least_bytes, tight.least_bytes + 4_000_000, 100_000):
        made = cut(checkpoint, "prompts", ROOM, room)
        head, worker = both(made)
        assert worker.peak_bytes <= room
        assert head.context_tokens == worker.context_tokens
        if worker.context_tokens < whole.context_tokens:
            continue
        assert head == whole
        assert (worker.chunk_tokens, worker.part_tokens) == (whole.chunk_tokens, whole.part_tokens)
        assert 512 <= worker.kv.tokens <= whole.kv.tokens
        check_given(worker, made.parts[1].spec, lambda block: 0)
        seen.add(worker.kv.pages)
    assert min(seen) == 8
    assert len(seen) > 2


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """Embedding and head are 1.2 MB each, and all the rest is 1.9."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 1, "head_dim": 16, "max_position_embeddings": 1024}
    model = tiny.hf_model("llama", seed=11, tie_word_embeddings=False, **sizes)
    path = tiny.save_gguf(model, tmp_path_factory.mktemp("m") / "wide.gguf", type="F16")
    with open_checkpoint(path) as opened:
        yield opened


@settings(deadline=None, max_examples=20)
@given(st.integers(7_000_000, 17_000_000), st.integers(7_000_000, 17_000_000), st.booleans())
def test_the_vocabulary_is_cut_where_that_helps(
    wide: Checkpoint, head: int, worker: int, may_cut: bool
) -> None:
    def planned(may_cut: bool) -> PlannedCut:
        rooms = [head, worker]
        return planned_cut(wide, CONFIG, choice("tensor"), rooms, [2, 3], may_cut_vocabulary=may_cut)

    made, whole = planned(may_cut), planned(False)
    rows = [cut_rows(wide.spec, shard) for shard in made.shards]
    if rows == [None, None]:
        assert made == whole._replace(parts=made.parts)
        return
    assert may_cut
    assert None not in rows
    assert whole.streamed_bytes > 0
    if isinstance(whole.plans, TooTight):
        assert whole.plans.rank == 0
    else:
        assert made.streamed_bytes == 0
    plans = both(made)
    assert [plan.peak_bytes <= room for plan, room in zip(plans, (head, worker), strict=True)] == [True, True]
    check_given(plans[1], made.parts[1].spec, lambda block: 0)


def test_rank_0_has_room_for_whole_logits(wide: Checkpoint) -> None:
    tried = (cut(wide, "tensor", room) for room in range(5_000_000, 40_000_000, 400_000))
    made = next(it for it in tried if not isinstance(it.plans, TooTight))
    for part, plan, known in zip(made.parts, both(made), (wide.spec.vocab, 0), strict=True):
        own = part.spec.vocab
        assert 0 < own < wide.spec.vocab
        without = scratch_bytes(wanted_by(plan, part.spec)._replace(vocab=0))
        logits = 4 * (plan.sequences + plan.guesses) * (2 * known - own) if known else 0
        assert not made.is_better(made)
        assert cut(wide, "tensor").is_better(made)
        assert not made.is_better(cut(wide, "tensor"))
        wanted_bytes = without + logits + arena_slack(plan.weights_bytes)
        assert plan.scratch_bytes == wanted_bytes


def test_a_group_for_prompts_has_no_cut_vocabulary(wide: Checkpoint) -> None:
    for head in range(5_000_000, 40_000_000, 5_000_000):
        made = cut(wide, "prompts", head)
        assert [shard.ranges.vocab.size for shard in made.shards] == [wide.spec.vocab, 0]
