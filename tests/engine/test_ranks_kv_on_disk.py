"""Ranks keep the KV of their own heads on disks of their own, where rank 0 says; a page is read by all or by none."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny
from fakes.group.ranks import Group, Leader
from fakes.running import FP32, planned

from shoal.engine.engine import Engine
from shoal.engine.order import Order, Reading, Segment
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.sampling import Sampler, SamplingParams
from shoal.offload.kv.disk_file import PAGES, KvFile
from shoal.offload.kv.disk_index import NO_TEXT, Entry, packed
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.disk_slots import KvSlots
from shoal.offload.kv.prefix_cache import Copy, PrefixCache, Save
from shoal.partition.plan import KvPlan

PAGE = 64
RANKS = 3
TEXT = np.random.default_rng(3).integers(tiny.END, size=2 * PAGE + 9).tolist()
SAVES = [Save(0, NO_TEXT, packed(TEXT[:PAGE])), Save(1, b"1" * 32, packed(TEXT[PAGE : 2 * PAGE]))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """KV heads are not divided evenly: two ranks share one."""
    model = tiny.hf_model("llama", seed=3, max_position_embeddings=512)
    path = tiny.save_gguf(model, tmp_path_factory.mktemp("model") / "m.gguf", type="F16")
    with open_checkpoint(path) as opened:
        yield opened


@contextmanager
def group(checkpoint: Checkpoint, directory: Path | None, pages: int = 8, slots: int = 40) -> Iterator[Group]:
    """Ranks, each with a directory for KV below `directory` if there is one."""
    base = replace(planned(checkpoint, FP32, 1 << 33), kv=KvPlan(pages, PAGE, "f32", 0), context_tokens=512)
    with closing(Group(checkpoint, base, RANKS)) as made:
        for number, rank in enumerate(made.ranks if directory else ()):
            assert directory is not None
            place = directory / str(number)
            place.mkdir(exist_ok=True)
            file = KvFile(place, bytes([number] * 32), rank.kv.page_bytes, PAGE)
            rank.disk = KvSlots(file, slots) if number else KvDisk(file, slots)
        yield made
        for rank in made.ranks:
            rank.close([])


def index_of(made: Group) -> KvDisk:
    disk = made.ranks[0].disk
    assert isinstance(disk, KvDisk)
    return disk


def written(made: Group) -> None:
    until_s = time.monotonic() + 30
    while not all(rank.disk._behind.idle for rank in made.ranks):  # type: ignore[union-attr]
        assert time.monotonic() < until_s
        time.sleep(0.001)


def entries(made: Group) -> list[Entry]:
    found = [index_of(made).index.find(save.parent, save.tokens) for save in SAVES]
    return [entry for entry in found if entry is not None]


def computed(made: Group) -> Floats:
    """Computes the text in pages 0, 1 and 2."""
    made.run(Order([Segment(TEXT[: 2 * PAGE], 0, [0, 1, 2], 0)]))
    return ended(made, [0, 1, 2])


def ended(made: Group, pages: list[int]) -> Floats:
    """Logits of the end of the text, whose first two pages are already there."""
    first, *_ = made.run(Order([Segment(TEXT[2 * PAGE :], 2 * PAGE, pages, 3)]))
    return first.logits


def overwritten() -> Order:
    """Another text in the pages, so that what was there is lost."""
    return Order([Segment(TEXT[::-1][: 2 * PAGE], 0, [0, 1, 2], 1)])


def read_back(made: Group) -> list[list[int]]:
    return [result.pages_read for result in made.run(Order(readings=[Reading(entries(made), [4, 5])]))]


def test_pages_come_back_on_every_rank_bit_for_bit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Also after all have been opened anew."""
    with group(checkpoint, tmp_path) as made:
        expected = computed(made)
        made.run(Order(moves=[SAVES[0], Copy(1, 7), SAVES[1]]))
        written(made)
        made.run(overwritten())
        assert read_back(made) == [[2]] * RANKS
        assert np.array_equal(ended(made, [4, 5, 6]), expected)
    with group(checkpoint, tmp_path) as made:
        made.run(overwritten())
        assert read_back(made) == [[2]] * RANKS
        assert np.array_equal(ended(made, [4, 5, 6]), expected)


def test_what_is_known_is_kept_on_closing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with group(checkpoint, tmp_path) as made:
        expected = computed(made)
        Leader(made).close(SAVES)
    with group(checkpoint, tmp_path) as made:
        assert read_back(made) == [[2]] * RANKS
        assert np.array_equal(ended(made, [4, 5, 6]), expected)


@pytest.mark.parametrize("broken", range(RANKS))
def test_a_page_that_one_rank_lost_counts_for_none(
    broken: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Rank 0 forgets it, so that it is saved again when it leaves memory next."""
    with group(checkpoint, tmp_path) as made:
        expected = computed(made)
        made.run(Order(moves=SAVES))
        written(made)
        slot = entries(made)[1].slot
        with (tmp_path / str(broken) / PAGES).open("r+b") as file:
            file.seek(slot * -(-made.ranks[broken].kv.page_bytes // 4096) * 4096 + 11)
            file.write(b"something else")
        assert read_back(made)[0] == [1]
        assert len(entries(made)) == 1
        made.run(Order(moves=SAVES))
        written(made)
        made.run(overwritten())
        assert read_back(made) == [[2]] * RANKS
        assert np.array_equal(ended(made, [4, 5, 6]), expected)


def test_a_rank_that_has_other_pages_or_no_disk_reads_none(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with group(checkpoint, tmp_path) as made:
        computed(made)
        made.run(Order(moves=SAVES))
        written(made)
    (tmp_path / "2" / PAGES).unlink()
    (tmp_path / "2" / "index.kv").unlink()
    with group(checkpoint, tmp_path) as made:
        assert read_back(made)[0] == [0]
        made.ranks[1].close([])
        made.ranks[1].disk = None
        assert len(entries(made)) == 1
        first, *_ = made.run(Order(readings=[Reading(entries(made), [4])]))
        assert first.pages_read == [0]
        assert entries(made) == []


def test_a_page_is_placed_once_and_slots_are_not_lost(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with group(checkpoint, tmp_path, slots=2) as made:
        computed(made)
        for _ in range(3):
            made.run(Order(moves=[*SAVES, *SAVES]))
            written(made)
        assert len(entries(made)) == 2 == len(index_of(made).index)
        assert read_back(made) == [[2]] * RANKS


def talk(made: Group, seed: int) -> list[list[int]]:
    """Some conversations that go on, more than fit into memory, and answers to them."""
    source = random.Random(seed)
    disk = made.ranks[0].disk
    index = disk.index if isinstance(disk, KvDisk) else None
    kv = made.ranks[0].kv
    cache = PrefixCache(kv.table, PAGE, index)
    scheduler = Scheduler(cache, sequences=2, queue=9, chunk_tokens=64, guesses=0, reads=3)
    ticks = itertools.count(step=0.001)
    engine = Engine(Leader(made), scheduler, lambda: next(ticks))
    texts = [[source.randrange(tiny.END) for _ in range(source.randrange(70, 150))] for _ in range(3)]
    for turn in range(6):
        text = texts[turn % 3]
        asked = Sequence(list(text), len(text) + 5, Sampler(SamplingParams(temperature=0.0), []))
        engine.submit(asked)
        while engine.busy:
            engine.step()
        text[:] = [*asked.tokens, *[source.randrange(tiny.END) for _ in range(20)]]
        if index is not None:
            written(made)
    engine.close()
    return texts


@pytest.mark.parametrize("said", [float("nan"), float("inf"), -3.0, 1e30])
def test_what_others_say_of_their_readings_is_bounded(
    said: float, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with group(checkpoint, tmp_path) as made:
        computed(made)
        made.run(Order(moves=SAVES))
        written(made)
        gather = made.members[2].gather
        monkeypatch.setattr(made.members[2], "gather", lambda rows: gather(np.full_like(rows, said)))
        assert read_back(made)[0] in ([0], [2])


def test_no_rank_has_more_pages_than_the_one_with_the_least_room(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Which of them it is may change."""
    with group(checkpoint, tmp_path) as made:
        room = [40]
        first = Leader(made)
        first._slots = lambda: room[0]
        computed(made)
        room[0] = 1
        first.run(Order(moves=[*SAVES]))
        written(made)
        assert [entry.slot for entry in entries(made)] == [0]
        room[0] = 2
        first.run(Order(moves=[*SAVES]))
        written(made)
        assert sorted(entry.slot for entry in entries(made)) == [0, 1]
        assert read_back(made) == [[2]] * RANKS


def test_conversations_are_the_same_and_are_read_from_disk(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with ExitStack() as stack:
        plain = stack.enter_context(group(checkpoint, None, pages=40))
        kept = stack.enter_context(group(checkpoint, tmp_path, pages=5))
        assert talk(kept, seed=1) == talk(plain, seed=1)
        disk = index_of(kept)
        assert disk.pages_read > 0 < disk.pages_written
    with group(checkpoint, tmp_path, pages=5) as again, group(checkpoint, None, pages=40) as plain:
        assert talk(again, seed=1) == talk(plain, seed=1)
        assert index_of(again).pages_read > 0
