"""The scheduler against a fake engine: order, budgets, limits, priorities, deadlines and whose turn it is."""

from __future__ import annotations

import pytest
from fakes.fake_engine import PAGE, FakeEngine, check_pages, continuation, scheduler, sequence

from shoal.engine.errors import NeverFits, QueueFull
from shoal.engine.learn.pacing import CROWD_STEP_S, FEW_TOGETHER, SLOWDOWN
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Ended, SequenceEvent


def ranges(engine: FakeEngine) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.end) for chunk in engine.step().chunks]


def words(length: int, seed: int = 1) -> list[int]:
    return [(seed * 31 + 7 * i) % 50 for i in range(length)]


def test_a_prompt_is_read_in_chunks() -> None:
    subject = scheduler(chunk=16)
    subject.submit(sequence(40, 2))
    engine = FakeEngine(subject)
    assert [ranges(engine) for _ in range(5)] == [[(0, 16)], [(16, 32)], [(32, 40)], [(40, 41)], []]


@pytest.mark.parametrize("token_s", [0.02, 0.3, 2.0])
def test_prompts_slow_decodes_only_so_far(token_s: float) -> None:
    """Whatever a token costs, and although it costs more and more, steps get longer by about as much as is allowed."""
    subject = scheduler(pages=500, chunk=64)
    asked = sequence(words(1200), 1)
    engine = FakeEngine(subject, lambda rows: 1.0 + (rows - 1) * token_s * (1 + asked.computed / 600))
    subject.submit(sequence(3, 700))
    for _ in range(20):
        engine.step()
    subject.submit(asked)
    seconds, rows = [], []
    while not asked.ended and len(rows) < 500:
        before_s = engine.now_s
        rows.append(engine.step().rows)
        seconds.append(engine.now_s - before_s)
    slow = sorted(seconds[20:])
    least = 1 + token_s * 3  # of one token, at the end
    assert slow[len(slow) * 95 // 100] <= max(1.25 * SLOWDOWN, 1.01 * least)
    assert slow[len(slow) // 2] > 0.75 * SLOWDOWN or max(rows) == 64 + 1
    assert rows.count(1) <= 1 + len(rows) // 16


@pytest.mark.parametrize(("step_s", "over"), [(1.0, 1.35), (0.01, 1.25)])
def test_a_crowd_does_not_wait_for_the_first_answers(step_s: float, over: float) -> None:
    """Of sixteen prompts four fit into the first step. The others have their first tokens in little more time than
    reading takes, and answers that run meanwhile are slowed by no more than four prompts may slow them, or get a token
    soon all the same."""

    def cost_s(rows: int) -> float:
        return step_s * (1.0 + (rows - 1) * 0.2)

    subject = scheduler(pages=2000, chunk=64, sequences=16, queue=16)
    asked = [sequence(words(16, seed), 1000) for seed in range(16)]
    engine = FakeEngine(subject, cost_s)
    for each in asked:
        subject.submit(each)
    engine.step()
    slowest = longest_s = 0.0
    while any(each.remaining > 1 for each in asked):
        batch = engine.step()
        slowest = max(slowest, cost_s(batch.rows) / cost_s(batch.decodes))
        longest_s = max(longest_s, cost_s(batch.rows))
    assert engine.now_s < over * step_s * 0.2 * 16 * 16
    assert slowest < 1.25 * (1 + FEW_TOGETHER * (SLOWDOWN - 1)) or longest_s < 1.25 * CROWD_STEP_S


def test_a_long_prompt_is_no_crowd_because_it_came_with_short_ones() -> None:
    """Once these are read, their answers are slowed as one prompt may slow them."""
    subject = scheduler(pages=2000, chunk=64, sequences=17, queue=17)

    def cost_s(rows: int) -> float:
        return 0.01 * (1.0 + (rows - 1) * 0.2)

    engine = FakeEngine(subject, cost_s)
    subject.submit(sequence(3, 1000))
    for _ in range(20):
        engine.step()
    asked = [sequence(words(length, seed), 1500) for seed, length in enumerate([5] * 15 + [1200])]
    for each in asked:
        subject.submit(each)
    slow = []
    while asked[-1].remaining > 1:
        batch = engine.step()
        if batch.decodes == 16 and batch.rows > 16:
            slow.append(cost_s(batch.rows) / cost_s(16))
    assert len(slow) > 20
    assert sorted(slow)[len(slow) * 9 // 10] < 1.25 * SLOWDOWN


def test_a_prompt_that_nobody_wants_any_more_is_not_counted_in_a_crowd() -> None:
    """Answers are slowed as one prompt may slow them, although there were sixteen for a step."""
    subject = scheduler(pages=2000, chunk=64, sequences=17, queue=17)
    engine = FakeEngine(subject, lambda rows: 0.01 * (1.0 + (rows - 1) * 0.2))
    subject.submit(sequence(3, 1000))
    for _ in range(20):
        engine.step()
    asked = [sequence(words(400, seed), 1000) for seed in range(16)]
    for each in asked:
        subject.submit(each)
    for _ in range(3):
        together = engine.step().rows
    for each in asked[1:]:
        subject.end(each, "cancelled")
    alone = [engine.step().rows for _ in range(6)]
    assert max(alone) - 1 < (together - 1) / 4


def test_steps_too_short_for_the_clock_are_no_trouble() -> None:
    subject = scheduler(chunk=16)
    for length in (3, 40, 40):
        subject.submit(sequence(words(length), 20))
    FakeEngine(subject, lambda rows: 0.0).run()


def test_alone_a_prompt_gets_the_whole_budget() -> None:
    subject = scheduler(chunk=16)
    subject.submit(sequence(words(12, 1), 1))
    subject.submit(sequence(words(12, 2), 1))
    assert ranges(FakeEngine(subject)) == [(0, 12), (0, 4)]


def test_the_limit_and_whoever_has_enough_end_a_sequence_and_free_its_pages() -> None:
    subject = scheduler(pages=8)
    engine = FakeEngine(subject)
    by_limit = engine.submit(sequence(2, 3))
    by_stop = engine.submit(sequence(2, 7), stop_after=2)
    engine.run()
    assert (by_limit.ended, len(by_limit.tokens)) == (["length"], 3)
    assert (by_stop.ended, len(by_stop.tokens)) == (["stop"], 2)
    assert subject.cache.used_pages == 0
    check_pages(subject)


def test_queue_full_and_too_long_are_refused_with_the_figures() -> None:
    subject = scheduler(pages=4, sequences=1, queue=1)
    with pytest.raises(NeverFits, match=r"prompt of 2 tokens may reach 17.*pool holds 16"):
        subject.submit(sequence(2, 15))
    subject.submit(sequence(2, 2))
    subject.submit(sequence(2, 2))
    with pytest.raises(QueueFull, match="2 requests run or wait, the limit is 1 and 1"):
        subject.submit(sequence(2, 2))


def test_a_full_queue_has_a_place_for_a_client_with_fewer_requests() -> None:
    subject = scheduler(sequences=1, queue=4)
    engine = FakeEngine(subject)
    running = engine.submit(sequence(words(2), 30, client="greedy"))
    engine.step()
    important = engine.submit(sequence(words(3), 2, client="greedy", priority=1))
    mine = [engine.submit(sequence(words(4 + n), 2, client="greedy")) for n in range(3)]
    for client in ("a", "b"):
        engine.submit(sequence(words(9), 2, client=client))
    assert [one.ended[0][:5] if one.ended else "" for one in mine] == ["", "error", "error"]
    assert isinstance(mine[2].error, QueueFull)
    assert not important.ended
    assert not running.ended
    engine.submit(sequence(words(9), 2, client="a"))
    assert isinstance(mine[0].error, QueueFull)
    for client in ("a", "greedy"):  # nobody else has more than these and one
        with pytest.raises(QueueFull):
            engine.submit(sequence(words(9), 2, client=client))
    engine.run()
    check_pages(subject)


def test_who_is_refused_is_told_to_wait_in_proportion_to_the_work() -> None:
    waits = []
    for backlog in (2, 8):
        subject = scheduler(pages=1000, sequences=1, queue=backlog, chunk=16)
        engine = FakeEngine(subject, lambda rows: 0.1)
        subject.submit(sequence(words(20), 20))
        engine.run()
        for number in range(backlog + 1):
            subject.submit(sequence(words(40, number), 20))
        with pytest.raises(QueueFull) as caught:
            subject.submit(sequence(1, 1))
        waits.append(caught.value.retry_after_s)
        engine.run()
    assert 2 * waits[0] < waits[1] < 4 * waits[0]


def test_one_failing_sampler_fails_one_sequence() -> None:
    subject = scheduler()
    engine = FakeEngine(subject)
    bad = engine.submit(sequence(words(2, 1), 3))
    good = engine.submit(sequence(words(2, 2), 3))
    batch = subject.next(0.0)
    _, second = engine._compute(batch)
    engine.hear(list(subject.commit(batch, [ValueError("nan"), second], [], now_s=1.0)))
    assert (bad.ended, good.ended, len(good.tokens)) == (["error nan"], [], 1)
    check_pages(subject)


def test_a_step_that_cannot_be_committed_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that would have ended with this step fails like the others."""
    subject = scheduler()
    engine = FakeEngine(subject)
    heard = [engine.submit(sequence(words(2, seed), new)) for seed, new in ((1, 1), (2, 5))]

    def broken(*arguments: object) -> None:
        raise ValueError("x")

    monkeypatch.setattr(subject.speeds, "note", broken)
    batch = subject.next(0.0)
    with pytest.raises(ValueError, match="x") as raised:
        list(subject.commit(batch, engine._compute(batch), [], now_s=1.0))
    engine.hear(subject.fail(batch.sequences, raised.value))
    assert [one.ended for one in heard] == [["error x"], ["error x"]]
    check_pages(subject)


def test_who_has_ended_before_a_commit_fails_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sequence ends with this step; the second breaks it. Nobody is left without a last event."""
    subject = scheduler()
    engine = FakeEngine(subject)
    asked = [sequence(words(2, seed), new) for seed, new in ((1, 1), (2, 5))]
    heard = [engine.submit(one) for one in asked]

    def broken(*arguments: object) -> None:
        raise ValueError("x")

    monkeypatch.setattr(asked[1].guesser, "score", broken)
    batch = subject.next(0.0)
    events: list[SequenceEvent] = []
    with pytest.raises(ValueError, match="x") as raised:
        events.extend(subject.commit(batch, engine._compute(batch), [], now_s=1.0))
    engine.hear([*events, *subject.fail(batch.sequences, raised.value)])
    assert [one.ended for one in heard] == [["length"], ["error x"]]
    check_pages(subject)


def test_what_failed_is_not_kept() -> None:
    subject = scheduler()
    subject.submit(failing := sequence(words(10), 3))
    FakeEngine(subject).step()
    subject.fail([failing], ValueError("x"))
    subject.submit(again := sequence(words(10), 3))
    subject.next(0.0)
    assert again.cached_tokens <= 8  # what it had shared before, not its last page
    check_pages(subject)


def test_a_deadline_ends_what_runs_and_what_waits() -> None:
    subject = scheduler(sequences=1)
    engine = FakeEngine(subject)
    heard = [engine.submit(sequence(3, 30, deadline_s=deadline_s)) for deadline_s in (5.0, 3.0, 1e9)]
    engine.run()
    assert [one.ended for one in heard] == [["deadline"], ["deadline"], ["length"]]
    assert [len(one.tokens) for one in heard] == [5, 0, 30]


def test_a_higher_priority_goes_first_and_interrupts() -> None:
    subject = scheduler(sequences=1)
    engine = FakeEngine(subject)
    low = engine.submit(sequence(words(9, 1), 20))
    for _ in range(5):
        engine.step()
    high = engine.submit(sequence(words(9, 2), 4, priority=1))
    while not high.ended:
        engine.step()
    assert len(low.tokens) == 5
    engine.run()
    assert low.tokens == continuation(words(9, 1), 20)
    assert subject.totals.preemptions == 1
    assert engine.rows_total < 9 + 20 + 9 + 4 + 3  # what it had computed was still in the cache


def test_equal_priorities_do_not_interrupt() -> None:
    subject = scheduler(sequences=1)
    subject.submit(sequence(words(9, 1), 20, priority=1))
    subject.submit(sequence(words(9, 2), 4, priority=1))
    FakeEngine(subject).run()
    assert subject.totals.preemptions == 0


def test_clients_take_turns_whatever_they_queue() -> None:
    subject = scheduler(sequences=1, queue=20)
    engine = FakeEngine(subject)
    for number in range(6):
        subject.submit(sequence(words(8, number), 4, client="greedy"))
    for number in range(3):
        subject.submit(sequence(words(8, 50 + number), 4, client="modest"))
    order: list[str] = []
    hear = engine.hear

    def noting(events: list[SequenceEvent]) -> None:
        order.extend(event.sequence.client for event in events if isinstance(event, Ended))
        hear(events)

    engine.hear = noting  # type: ignore[method-assign,assignment]
    engine.run()
    assert sorted(order[:6]) == ["greedy"] * 3 + ["modest"] * 3


def test_a_long_prompt_does_not_hold_up_the_short_one_of_another() -> None:
    subject = scheduler(pages=300, chunk=16)
    engine = FakeEngine(subject)
    subject.submit(sequence(words(600), 2, client="long"))
    for _ in range(3):
        engine.step()
    short = engine.submit(sequence(words(10, 9), 2, client="short"))
    engine.step()
    engine.step()
    assert short.tokens


def test_a_later_turn_computes_only_what_is_new() -> None:
    subject = scheduler()
    engine = FakeEngine(subject)
    text = words(21)
    for turn in range(4):
        heard = engine.submit(asked := sequence(text, 6))
        before = engine.rows_total
        engine.run()
        assert heard.tokens == continuation(text, 6)
        if turn:
            assert asked.cached_tokens == len(text) - 4  # 3 new, and the last one answered
            assert engine.rows_total - before == 4 + 5
        text = [*text, *heard.tokens, *words(3, turn)]
    check_pages(subject)


def test_equal_prompts_at_once_are_computed_once() -> None:
    subject = scheduler(pages=200, chunk=16)
    engine = FakeEngine(subject)
    heard = [engine.submit(sequence(words(101), 3)) for _ in range(4)]
    engine.run()
    assert all(one.tokens == continuation(words(101), 3) for one in heard)
    assert engine.rows_total < 101 + 4 * 20


def test_the_last_token_of_a_known_prompt_is_computed() -> None:
    for length in (PAGE, 2 * PAGE, 2 * PAGE + 1):
        subject = scheduler()
        engine = FakeEngine(subject)
        for _ in range(2):
            heard = engine.submit(asked := sequence(words(length), 3))
            engine.run()
            assert heard.tokens == continuation(words(length), 3)
        assert asked.cached_tokens == length - 1


def test_cancelling_a_prompt_frees_its_pages_at_once() -> None:
    subject = scheduler(pages=64, chunk=16)
    engine = FakeEngine(subject)
    subject.submit(asked := sequence(words(60), 4))
    engine.step()
    engine.step(lambda batch: engine.cancel(asked))
    assert subject.cache.used_pages == 0
    check_pages(subject)
    heard = engine.submit(again := sequence(words(60), 4))
    engine.run()
    assert heard.tokens == continuation(words(60), 4)
    assert again.cached_tokens == 16


def fill(subject: Scheduler, engine: FakeEngine, answers: int, tokens: int) -> None:
    """Let it learn how long answers are."""
    for number in range(answers):
        subject.submit(sequence(words(2, 100 + number), tokens))
        engine.run()


def test_short_answers_let_more_in_than_the_worst_case_would() -> None:
    subject = scheduler(pages=50, sequences=8)
    engine = FakeEngine(subject)
    fill(subject, engine, 40, 4)
    for number in range(6):
        engine.submit(sequence(words(8, number), 150), stop_after=4)  # 40 pages at worst
    engine.step()
    assert len(subject.running) == 6
    engine.run()
    assert subject.totals.preemptions == 0


def test_a_wrong_guess_is_mended_by_preemption() -> None:
    subject = scheduler(pages=24, sequences=8)
    engine = FakeEngine(subject)
    fill(subject, engine, 40, 4)
    # 20 pages each: one after the other
    heard = [engine.submit(sequence(words(8, number), 70)) for number in range(5)]
    engine.run()
    assert subject.totals.preemptions > 0
    for number, one in enumerate(heard):
        assert one.tokens == continuation(words(8, number), 70)
        assert one.ended == ["length"]


@pytest.mark.parametrize(("pages", "together"), [(8, 2), (7, 1)])
def test_what_fits_exactly_is_let_in(pages: int, together: int) -> None:
    """Each has six tokens, half a page to spare and eight more to come: 32 slots at the peak, which is eight pages."""
    subject = scheduler(pages=pages)
    engine = FakeEngine(subject)
    heard = [engine.submit(sequence(words(6, seed), 8)) for seed in (1, 2)]
    engine.step()
    assert len(subject.running) == together
    engine.run()
    assert [one.tokens for one in heard] == [continuation(words(6, seed), 8) for seed in (1, 2)]
    assert subject.totals.preemptions == 0


def test_what_another_prompt_computes_just_now_is_waited_for() -> None:
    """Prompts with a common beginning that come together compute it once, also within one step."""
    subject = scheduler(pages=200, chunk=200)
    engine = FakeEngine(subject)
    beginning = words(30)
    texts = [[*beginning, *words(11, seed)] for seed in range(2, 6)]
    heard = [engine.submit(sequence(text, 1)) for text in texts]
    engine.run()
    assert [one.tokens for one in heard] == [continuation(text, 1) for text in texts]
    assert engine.rows_total <= 41 + 3 * (41 - 28)
    check_pages(subject)


def test_who_waits_for_a_prompt_that_is_cancelled_goes_on_alone() -> None:
    subject = scheduler(pages=200, chunk=16)
    engine = FakeEngine(subject)
    subject.submit(first := sequence(words(41), 1))
    heard = engine.submit(sequence(words(41), 1))
    engine.step(lambda batch: engine.cancel(first))
    engine.run()
    assert heard.tokens == continuation(words(41), 1)
    check_pages(subject)
