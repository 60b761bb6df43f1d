"""The scheduler against scripted sequences: order, budgets, limits, and nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.comm.messages import FinishReason
from shoal.daemon.errors import DaemonError
from shoal.daemon.scheduler import Scheduler
from shoal.daemon.sequence import Sequence, Times
from shoal.daemon.speculation import Speculation
from shoal.models.sampling import Sampled, Sampler, SamplingParams
from shoal.offload.pages import PageTable

PAGE = 4


class Recorder:
    def __init__(self, stop_after: int | None = None) -> None:
        self.begun = False
        self.tokens: list[int] = []
        self.ended: list[str] = []
        self.stop_after = stop_after

    def begin(self, sequence: Sequence) -> None:
        self.begun = True

    def accept(self, sampled: Sampled) -> FinishReason | None:
        self.tokens.append(sampled.token_id)
        return "stop" if self.stop_after == len(self.tokens) else None

    def finish(self, reason: FinishReason, times: Times) -> None:
        self.ended.append(reason)

    def fail(self, error: Exception) -> None:
        self.ended.append(f"error {error}")


def sequence(prompt: int, limit: int, sink: Recorder | None = None) -> Sequence:
    return Sequence([1] * prompt, limit, Sampler(SamplingParams(), []), sink or Recorder())


def scheduler(
    pages: int = 64, sequences: int = 4, queue: int = 8, chunk: int = 16, guesses: int = 0
) -> Scheduler:
    return Scheduler(
        PageTable(pages),
        page_tokens=PAGE,
        sequences=sequences,
        queue=queue,
        chunk_tokens=chunk,
        speculation=Speculation(guesses),
    )


def sampled(token: int = 7) -> Sampled:
    return Sampled(token, 0.0, ())


def run_step(subject: Scheduler) -> list[tuple[int, int]]:
    batch = subject.next()
    subject.commit(batch, [[sampled()] if chunk.samples else [] for chunk in batch])
    return [(chunk.start, chunk.end) for chunk in batch]


def test_a_prompt_is_cut_at_fixed_positions() -> None:
    subject = scheduler(chunk=16)
    subject.submit(sequence(40, 42))
    assert [run_step(subject) for _ in range(5)] == [[(0, 16)], [(16, 32)], [(32, 40)], [(40, 41)], []]


def test_decodes_go_before_prefill_and_prefill_keeps_its_budget() -> None:
    subject = scheduler(chunk=16)
    subject.submit(sequence(3, 20))
    run_step(subject)
    subject.submit(sequence(30, 40))
    subject.submit(sequence(10, 20))
    assert run_step(subject) == [(3, 4), (0, 16)]
    assert run_step(subject) == [(4, 5), (16, 30)]
    assert run_step(subject) == [(5, 6), (30, 31), (0, 10)]


def test_the_limit_and_the_sink_end_a_sequence_and_free_its_pages() -> None:
    subject = scheduler(pages=8)
    by_limit, by_stop = Recorder(), Recorder(stop_after=2)
    subject.submit(sequence(2, 5, by_limit))
    subject.submit(sequence(2, 9, by_stop))
    while run_step(subject):
        pass
    assert (by_limit.ended, len(by_limit.tokens)) == (["length"], 3)
    assert (by_stop.ended, len(by_stop.tokens)) == (["stop"], 2)
    assert subject._table.free_pages == 8


def test_queue_full_and_too_long_are_refused() -> None:
    subject = scheduler(pages=4, sequences=1, queue=1)
    with pytest.raises(DaemonError, match="KV pool holds 16") as caught:
        subject.submit(sequence(2, 17))
    assert caught.value.code == "resources"
    subject.submit(sequence(2, 4))
    subject.submit(sequence(2, 4))
    with pytest.raises(DaemonError) as caught:
        subject.submit(sequence(2, 4))
    assert caught.value.code == "busy"
    assert caught.value.retry_after_s > 0


def test_one_failing_sampler_fails_one_sequence() -> None:
    subject = scheduler()
    bad, good = Recorder(), Recorder()
    subject.submit(sequence(2, 5, bad))
    subject.submit(sequence(2, 5, good))
    subject.commit(subject.next(), [[ValueError("nan")], [sampled()]])
    assert (bad.ended, good.ended, good.tokens) == (["error nan"], [], [7])


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=8),
    st.lists(st.integers(0, 7), max_size=6),
    st.integers(12, 40),
)
def test_everything_ends_exactly_once(jobs: list[tuple[int, int]], cancels: list[int], pages: int) -> None:
    subject = scheduler(pages=pages, sequences=3)
    sinks, sequences = [], []
    for prompt, new in jobs:
        sinks.append(Recorder())
        sequences.append(sequence(prompt, prompt + new, sinks[-1]))
        try:
            subject.submit(sequences[-1])
        except DaemonError:
            sinks.pop(), sequences.pop()
    for step in range(400):
        batch = subject.next()
        if step < len(cancels) and cancels[step] < len(sequences):  # in the middle of a step
            subject.cancel(sequences[cancels[step]])
        if not batch:
            break
        subject.commit(batch, [[sampled()] if chunk.samples else [] for chunk in batch])
    assert all(len(sink.ended) == 1 for sink in sinks)
    assert subject._table.free_pages == pages
    assert not subject.running
    assert not subject.waiting
