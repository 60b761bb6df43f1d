"""Rank 0 computes short orders alone and long ones with a group: the texts are those of a rank that is always alone,
and the others' copies of K and V are what rank 0 has.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.group.assisting import Assisting
from fakes.group.ranks import orders
from fakes.running import FP32, Running, planned, relative_error

from shoal.engine.engine import Engine
from shoal.engine.executor import Abandoned
from shoal.engine.order import Order, Segment
from shoal.engine.rank import Rank
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.sampling import Sampler, SamplingParams
from shoal.offload.kv.disk_file import KvFile
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.pool import KvPool
from shoal.offload.kv.prefix_cache import Copy, PrefixCache
from shoal.partition.plan import KvPlan, Plan

TOLERANCE = 1e-3
PAGE = 64
# Times rank 0 is asked: before each of two blocks a layer and of three frames of each of two pages, …
ASKED = 14
MOMENTS = range(1, ASKED + 1)


def saved(family: str, directory: Path, **sizes: Any) -> Path:
    if family in tiny.EXPERT_SIZES:
        sizes = {tiny.EXPERT_SIZES[family]: 64} | sizes
    return tiny.save_gguf(tiny.hf_model(family, seed=3, **sizes), directory / "m.gguf", type="F16")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(path) as opened:
        yield opened


def based(checkpoint: Checkpoint, pages: int = 8, kv_type: str = "f32") -> Plan:
    plan = planned(checkpoint, FP32, 1 << 33)
    return replace(plan, kv=KvPlan(pages, PAGE, kv_type, 0), context_tokens=512)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("ranks", "shares"), [(2, (1, 3)), (4, ())])
def test_every_family_is_computed_as_alone(
    family: str, ranks: int, shares: tuple[float, ...], tmp_path: Path
) -> None:
    """Prompts in chunks, a text that goes on from a copied page, decodes, some with guesses, which are short. Four
    ranks share two KV heads."""
    path = saved(family, tmp_path)
    running = Running(path)
    alone = Rank(running.executor, lambda: 0.0)
    with (
        open_checkpoint(path) as checkpoint,
        closing(Assisting(checkpoint, running.plan, ranks, shares)) as made,
    ):
        work = orders(checkpoint.spec.vocab, seed=ranks)
        for order in [*work, *work]:
            wanted = alone.run(order).logits
            logits = made.rank.run(order).logits
            assert len(logits) == len(wanted)
            if wanted.size:
                assert relative_error(logits, wanted) <= TOLERANCE
            made.assert_alike()
        assert len(made.others.orders) == 6
        assert not made.lost


@pytest.mark.parametrize("kv_type", ["f32", "f16", "i8"])
@pytest.mark.parametrize(
    ("ranks", "shares", "copied"), [(2, (3, 1), 12), (3, (), 12), (2, (), 5), (3, (), 4)]
)
def test_what_a_group_reads_is_what_rank_0_has(
    kv_type: str, ranks: int, shares: tuple[float, ...], copied: int, checkpoint: Checkpoint, path: Path
) -> None:
    """Texts that grow by long and short steps, together and apart, are copied, and leave their pages to others. The
    others have pages for all of that, or for some."""
    source = random.Random(ranks)
    base = based(checkpoint, 12, kv_type)
    alone = Rank(Running(path, replace(FP32, kv_type=kv_type, kv_tokens=12 * PAGE)).executor, lambda: 0.0)
    with closing(
        Assisting(checkpoint, base, ranks, shares, group_rows=20, page_rows=3, pages=copied)
    ) as made:
        pages = made.rank.kv.table
        texts: list[tuple[list[int], list[int]]] = []  # tokens, pages
        for _ in range(40):
            while len(texts) > 3 or (texts and source.random() < 0.15):
                pages.give_back(texts.pop(source.randrange(len(texts)))[1])
            moves = []
            if not texts or source.random() < 0.4:
                tokens: list[int] = []
                own = pages.take(2)
                assert own is not None
                known = [text for text, _ in texts if text]
                if known and source.random() < 0.5:
                    of = source.randrange(len(texts))
                    tokens = texts[of][0][: min(40, len(texts[of][0]))]
                    moves = [Copy(texts[of][1][0], own[0])]
                texts.append((tokens, own))
            segments = []
            for tokens, own in texts:
                count = min(source.choice([0, 1, 1, 30, 50]), 2 * PAGE - len(tokens))
                if count:
                    more = [source.randrange(tiny.END) for _ in range(count)]
                    segments.append(Segment(more, len(tokens), own, 1))
                    tokens += more
            order = Order(segments, moves)
            wanted, logits = alone.run(order).logits, made.rank.run(order).logits
            if segments:
                assert relative_error(logits, wanted) <= (TOLERANCE if kv_type == "f32" else 2e-2)
            made.assert_alike()
            assert len(made.rank._alike) <= copied
        assert 5 < len(made.others.orders) < 35
        assert not made.lost


def test_short_orders_and_those_for_which_much_has_to_pass_are_rank_0s_own(checkpoint: Checkpoint) -> None:
    text = np.random.default_rng(3).integers(tiny.END, size=400).tolist()

    def step(start: int, count: int) -> int:
        """How many orders the group has begun after it."""
        made.rank.run(Order([Segment(text[start : start + count], start, list(range(7)), 1)]))
        return len(made.others.orders)

    with closing(Assisting(checkpoint, based(checkpoint), 2, group_rows=20, page_rows=10)) as made:
        assert step(0, 29) == 0  # it would write a page
        assert step(0, 30) == 1
        assert step(30, 30) == 2  # the page that it reads and writes is known
        assert step(60, 1) == 2
        assert step(61, 49) == 2  # one to send and two to get back
        assert step(61, 50) == 3
        made.rank.run(Order(moves=[Copy(1, 3), Copy(0, 0)]))
        assert step(111, 49) == 3  # again
        assert step(111, 59) == 3  # another one to send
        assert step(111, 60) == 4


def test_what_the_others_have_no_pages_for_is_rank_0s_own(checkpoint: Checkpoint, path: Path) -> None:
    """They go on with the pages that they have as soon as these do again."""
    text = np.random.default_rng(5).integers(tiny.END, size=5 * PAGE).tolist()
    alone = Rank(Running(path, replace(FP32, context_tokens=512, kv_tokens=8 * PAGE)).executor, lambda: 0.0)
    long, begun = [7, 6, 5, 4], []
    with closing(Assisting(checkpoint, based(checkpoint), 2, group_rows=20, pages=3)) as made:
        for own, start in [(long, 0), (long, 64), (long, 128), (long, 192), ([2], 0), (long, 128), ([0], 0)]:
            order = Order([Segment(text[start : start + 64], start, own, 1)])
            assert relative_error(made.rank.run(order).logits, alone.run(order).logits) <= TOLERANCE
            made.assert_alike()
            begun.append(len(made.others.orders))
    assert begun == [1, 2, 3, 3, 4, 5, 6]


def ended_by(error: Exception, after: int) -> Callable[[float], bool]:
    """Somebody who is asked so many times before that happens."""
    asked = itertools.count()

    def wanted(share: float) -> bool:
        if next(asked) < after:
            return True
        raise error

    return wanted


@pytest.mark.parametrize("seed", range(2))
def test_copies_are_right_whatever_was_given_up_failed_or_undone(
    seed: int, checkpoint: Checkpoint, path: Path
) -> None:
    """The others have places for two texts of three. Steps of other tokens end at any moment before the right ones
    come, and of what was written some does not count."""
    source = random.Random(seed)
    alone = Rank(Running(path, replace(FP32, kv_tokens=12 * PAGE)).executor, lambda: 0.0)
    with closing(
        Assisting(checkpoint, based(checkpoint, 12), 3, group_rows=20, page_rows=3, pages=4)
    ) as made:
        texts: list[tuple[list[int], list[int]]] = [
            ([], [page, 11 - page]) for page in range(3)
        ]  # tokens, pages
        for _ in range(30):
            segments = []
            for tokens, pages in texts:
                if source.random() < 0.2:
                    del tokens[source.randrange(len(tokens) + 1) :]
                if count := min(source.choice([0, 1, 30, 50]), 2 * PAGE - len(tokens)):
                    more = [source.randrange(tiny.END) for _ in range(count)]
                    segments.append(Segment(more, len(tokens), pages, 1))
                    tokens += more
            if not segments:
                continue
            error = source.choice([Abandoned(), OSError("the disk is on fire")])
            others = [it._replace(tokens=[*it.tokens][::-1]) for it in segments]
            with suppress(Abandoned, OSError):
                made.rank.run(Order(others), ended_by(error, source.randrange(20)))
            made.assert_alike()
            order = Order(segments)
            assert relative_error(made.rank.run(order).logits, alone.run(order).logits) <= TOLERANCE
            made.assert_alike()
        assert len(made.others.orders) > 5
        assert not made.lost


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("moment", MOMENTS)
def test_what_is_given_up_or_fails_leaves_all_as_it_was(
    moment: int, ranks: int, checkpoint: Checkpoint
) -> None:
    text = np.random.default_rng(3).integers(tiny.END, size=200).tolist()
    order = Order([Segment(text[70:170], 70, [0, 1, 2], 1)])

    def at(act: Callable[[], bool]) -> Callable[[float], bool]:
        asked = itertools.count(1)
        return lambda share: act() if next(asked) == moment else True

    def fail() -> bool:
        raise OSError("the disk is on fire")

    with closing(Assisting(checkpoint, based(checkpoint), ranks)) as made:
        made.rank.run(Order([Segment(text[:50], 0, [0], 0)]))
        for start in range(50, 70, 5):  # alone
            made.rank.run(Order([Segment(text[start : start + 5], start, [0, 1], 0)]))
        wanted = made.rank.run(order).logits
        made.rank._alike.discard(0)
        for error, wish in ((Abandoned, bool), (OSError, fail)):
            with pytest.raises(error):
                made.rank.run(order, at(wish))
            made.assert_alike()
        assert np.array_equal(made.rank.run(order).logits, wanted)
        assert not made.lost


@pytest.mark.parametrize("moment", MOMENTS)
def test_without_a_lost_rank_the_step_goes_on_alone_at_once(moment: int, checkpoint: Checkpoint) -> None:
    text = np.random.default_rng(3).integers(tiny.END, size=200).tolist()
    with closing(Assisting(checkpoint, based(checkpoint), 3)) as made:
        first, second = (Order([Segment(text[a:b], a, [0, 1, 2], 1)]) for a, b in ((0, 70), (70, 170)))
        made.rank.run(first)
        expected = made.rank.run(second).logits
        asked = itertools.count(1)
        began_s = time.monotonic()
        logits = made.rank.run(second, lambda share: next(asked) != moment or not made.cut(2)).logits
        assert relative_error(logits, expected) <= TOLERANCE
        assert time.monotonic() - began_s < 5
        assert made.lost == [2]
        begun = len(made.others.orders)
        assert relative_error(made.rank.run(second).logits, expected) <= TOLERANCE
        assert len(made.others.orders) == begun


def talk(rank: Rank, seed: int, turns: int) -> list[list[int]]:
    """Conversations that go on, more than fit into memory, answered beside each other, some of them cancelled."""
    source = random.Random(seed)
    index = rank.disk.index if isinstance(rank.disk, KvDisk) else None
    cache = PrefixCache(rank.kv.table, PAGE, index)
    scheduler = Scheduler(cache, sequences=3, queue=9, chunk_tokens=64, guesses=4, reads=3)
    ticks = itertools.count(step=0.001)
    engine = Engine(rank, scheduler, lambda: next(ticks))
    texts = [[source.randrange(tiny.END) for _ in range(source.randrange(70, 130))] for _ in range(3)]
    for turn in range(turns):
        asked = [
            Sequence(list(text), len(text) + 12, Sampler(SamplingParams(temperature=0.0), []))
            for text in texts
        ]
        given_up = Sequence(texts[turn % 3][::-1], 200, Sampler(SamplingParams(temperature=0.0), []))
        for sequence in (*asked, given_up):
            engine.submit(sequence)
        for step in itertools.count():
            if not engine.busy:
                break
            engine.step()
            if step == 4:
                engine.end(given_up, "cancelled")
        for text, sequence in zip(texts, asked, strict=True):
            text[:] = [*sequence.tokens, *[source.randrange(tiny.END) for _ in range(15)]]
        if index is not None:
            assert isinstance(rank.disk, KvDisk)
            until_s = time.monotonic() + 20
            while not rank.disk._behind.idle:
                assert time.monotonic() < until_s
                time.sleep(0.001)
    engine.close()
    return texts


def test_conversations_are_those_of_a_rank_alone(checkpoint: Checkpoint, path: Path, tmp_path: Path) -> None:
    """Second turns go on from answers that were decoded alone, beginnings are shared, and KV goes to disk and back:
    all of it is in rank 0's pool, and workers have no files."""

    def on_disk(kv: KvPool) -> KvDisk:
        return KvDisk(KvFile(tmp_path, b"1" * 32, kv.page_bytes, PAGE), 40)

    config = replace(FP32, context_tokens=512, kv_tokens=40 * PAGE)
    for turns in (3, 4):  # the second time with what the first has left on disk
        wanted = talk(Rank(Running(path, config).executor, lambda: 0.0), 1, turns)
        with closing(Assisting(checkpoint, based(checkpoint, 9), 3, (2, 1, 1), disk=on_disk)) as made:
            assert talk(made.rank, 1, turns) == wanted
            made.assert_alike()
            assert len(made.others.orders) >= 3
            disk = made.rank.disk
            assert disk is not None
            assert disk.pages_written > 0
    assert disk.pages_read > 0
