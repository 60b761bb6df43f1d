"""The scheduler under random work: it always ends, each request gets the text it would get alone, no page is lost."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from fakes.fake_engine import FakeDisk, FakeEngine, check_pages, continuation, scheduler, sequence
from fakes.listening import Heard
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.batch import Batch
from shoal.engine.errors import EngineError, NeverFits, QueueFull
from shoal.engine.sequence import Sequence
from shoal.offload.kv.disk_index import KvIndex
from shoal.partition.spec import RopeSpec


@dataclass
class Asked:
    prompt: list[int]
    new: int
    sequence: Sequence
    heard: Heard
    interrupted: bool = False


LONGROPE = RopeSpec(2, 100.0, divisors=(1.0,), long_divisors=(2.0,), long_from_tokens=17)
DYNAMIC = RopeSpec(4, 100.0, dynamic_factor=2.0, dynamic_from_tokens=13)


def play(seed: int, *ropes: RopeSpec) -> tuple[int, int, int]:
    """One random workload. → how often something was preempted, how many guesses were right, how many pages were read
    from disk"""
    source = random.Random(seed)
    pages = source.randint(6, 40)
    slots = source.choice([0, 3, 20, 200])
    disk = FakeDisk(KvIndex(slots), lambda: source.random() < 0.05) if slots else None
    subject = scheduler(
        pages,
        sequences=source.randint(1, 6),
        queue=source.randint(0, 12),
        chunk=source.randint(1, 40),
        guesses=source.choice([0, 3, 32]),
        index=disk.index if disk else None,
        ropes=ropes,
    )
    row_s, step_s = source.random(), source.random() * 20
    read_s = source.choice([0.01, 1.0, 5.0])
    engine = FakeEngine(subject, lambda rows: step_s + rows * row_s + 1e-3, disk, read_s)
    stems = [[source.randrange(5) for _ in range(source.randrange(30))] for _ in range(3)]
    asked: list[Asked] = []

    def submit() -> None:
        stem = source.choice([*stems, *(one.prompt + one.heard.tokens for one in asked[-2:])])
        prompt = stem[: source.randint(0, len(stem))] + [
            source.randrange(5) for _ in range(source.randint(1, 9))
        ]
        new, enough = source.randint(1, 30), source.choice([None, None, source.randint(1, 10)])
        one = sequence(
            prompt,
            new,
            client=source.choice("abc"),
            priority=source.choice([0, 0, 0, 1, -1]),
            deadline_s=source.choice([1e9, 1e9, 1e9, engine.now_s + source.random() * 300]),
        )
        try:
            heard = engine.submit(one, enough)
        except EngineError as error:
            refused = type(error)
        else:
            asked.append(Asked(prompt, new, one, heard))
            return
        assert refused == (QueueFull if -(-one.limit // 4) <= pages else NeverFits)

    def meanwhile(batch: Batch) -> None:
        if asked and source.random() < 0.03:
            victim = source.choice(asked)
            victim.interrupted = victim.interrupted or not victim.heard.ended
            engine.cancel(victim.sequence)

    for _ in range(source.randint(5, 60)):
        for _ in range(source.choice([0, 0, 0, 1, 1, 5])):
            submit()
        engine.step(meanwhile)
        check_pages(subject)
    engine.run(limit=3000)
    check_pages(subject)
    assert subject.cache.used_pages == 0
    for one in asked:
        assert len(one.heard.ended) == 1
        truth = continuation(one.prompt, one.new, ropes)
        if one.heard.stop_after is not None:
            truth = truth[: one.heard.stop_after]
        if isinstance(one.heard.error, QueueFull):  # it went for a client with fewer requests
            truth = []
        if one.interrupted or one.heard.ended == ["deadline"]:
            truth = truth[: len(one.heard.tokens)]
        assert one.heard.tokens == truth
    return subject.totals.preemptions, subject.totals.accepted_tokens, disk.read_pages if disk else 0


def test_many_random_workloads() -> None:
    preempted, accepted, read = zip(*(play(seed) for seed in range(100)), strict=True)
    assert sum(preempted) > 40
    assert sum(accepted) > 400
    assert sum(read) > 100


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_ropes_that_depend_on_the_length_of_a_text(rope: RopeSpec) -> None:
    """No text is computed from keys with other ropes than its own, and preemption changes none."""
    preempted, accepted, read = zip(*(play(seed, rope) for seed in range(200, 300)), strict=True)
    assert min(sum(preempted), sum(accepted), sum(read)) > 40


@settings(deadline=None, max_examples=30)
@given(st.integers(10_000, 1 << 40))
def test_further_random_workloads(seed: int) -> None:
    play(seed)
