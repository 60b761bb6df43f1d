"""Answers run beside the engine: slow clients lengthen no step, and an answer that a stop string ends has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from fakes.asking import CONFIG, prompt, text_of
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.messages import Accepted, Done, Error, Load, Timings, Token
from shoal.daemon.answer import Answer
from shoal.daemon.answer_thread import Answering
from shoal.daemon.backend import Event
from shoal.daemon.node import Node
from shoal.engine.sequence import Emitted, Ended, Failed, Queued, Sequence, Times
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.errors import LogitsError, Overloaded, TokenizerError
from shoal.models.sampling import Sampled, Sampler, SamplingParams
from shoal.models.tokenizer.tokenizer import Tokenizer

PATIENCE_S = 30.0


def eventually(met: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + PATIENCE_S
    while not met() and time.monotonic() < until_s:
        time.sleep(0.001)
    return met()


def test_who_takes_messages_slowly_holds_up_no_step(node: Node) -> None:
    """Both sequences are computed to their ends while nobody has taken the first message."""
    held = threading.Event()
    events: list[Event] = []

    def slow(event: Event) -> None:
        assert held.wait(PATIENCE_S)
        events.append(event)

    (model,) = node._models
    for index in range(2):
        node.submit(prompt(index, new=24), slow)
    assert eventually(lambda: model.engine.scheduler.totals.generated_tokens == 48 and not model.engine.busy)
    assert not events
    held.set()
    node.drain(PATIENCE_S)
    assert [type(event) for event in events if not isinstance(event, Token)] == [
        Accepted,
        Accepted,
        Done,
        Done,
    ] or (
        [type(event) for event in events if not isinstance(event, Token)] == [Accepted, Done, Accepted, Done]
    )


def test_an_answer_that_matches_slowly_holds_up_no_step(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long list of stop strings makes matching slow."""
    (model,) = node._models
    text, ids, _ = text_of(node, prompt(0, new=24))
    before = model.engine.scheduler.totals.generated_tokens
    held = threading.Event()
    say = Answer._say

    def slow(answer: Answer, sampled: Sampled) -> bool:
        assert held.wait(PATIENCE_S)
        return say(answer, sampled)

    monkeypatch.setattr(Answer, "_say", slow)
    threading.Timer(
        0.0,
        lambda: (
            eventually(lambda: model.engine.scheduler.totals.generated_tokens == before + 24) and held.set()
        ),
    ).start()
    assert text_of(node, prompt(0, new=24))[:2] == (text, ids)


def test_a_stop_string_ends_the_answer_however_far_the_engine_is(path: Path) -> None:
    """Up to the stop string it is the same answer as without one, also if the stop string ends with the last token."""
    with Node(replace(CONFIG, max_guesses=8)) as node:
        node.load(Load(model=str(path)))
        text, ids, whole = text_of(node, prompt(3, new=24))
        assert whole.finish_reason == "length"
        starts = {text.find(text[at : at + 3]) for at in range(len(text) - 2)}
        for start in sorted(starts)[::3]:
            stop = text[start : start + 3]
            found, some, done = text_of(node, prompt(3, new=24, stop=[stop]))
            assert (found, done.finish_reason) == (text[:start], "stop")
            assert some == ids[: len(some)]
            assert done.usage.completion_tokens == len(some)
        last = text_of(node, prompt(3, new=24, stop=[text[-3:]]))
        assert last[2].finish_reason == "stop" or text.find(text[-3:]) < len(text) - 3


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.tokenizer()


def answer(tokenizer: Tokenizer, emitted: list[Event], stop: list[str]) -> Answer:
    return Answer(emitted.append, "tiny", tokenizer, [5], stop=stop, logprobs=False, context_tokens=96)


def test_tokens_that_are_parts_of_a_character_have_their_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é", add_special=False)
    assert len(ids) == 2
    control = next(token for token in range(tokenizer.vocab_size) if tokenizer.is_special(token))
    letter = tokenizer.encode("a", add_special=False)[0]
    emitted: list[Event] = []
    subject = Answer(emitted.append, "tiny", tokenizer, [5], stop=[], logprobs=True, context_tokens=96)
    for chosen, top in zip(
        ids, (((ids[0], -1.0), (letter, -2.0), (control, -3.0)), ((letter, -1.0),)), strict=True
    ):
        subject.take(Emitted(sequence(), [Sampled(chosen, -1.0, top)], 0.0))
    first, second = (event.logprobs[0] for event in emitted if isinstance(event, Token))
    assert (first.text, first.token_bytes) == ("\ufffd", b"\xc3")
    assert first.top_bytes == [b"\xc3", None, None]
    assert [text for _, text, _ in first.top] == ["\ufffd", "a", tokenizer.decode([control])]
    assert (second.text, second.token_bytes, second.top_bytes) == ("\ufffd", b"\xa9", [])


def sequence() -> Sequence:
    return Sequence([5], 90, Sampler(SamplingParams(), []))


@given(
    ids=st.lists(st.integers(10, 200), min_size=1, max_size=20),
    cuts=st.sets(st.integers(0, 20)),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=3),
    failing=st.booleans(),
)
def test_steps_of_several_tokens_make_the_same_answer(
    tokenizer: Tokenizer, ids: list[int], cuts: set[int], stop: list[str], failing: bool
) -> None:
    """One token in each step, or many as when guesses are right: the messages are the same, one of them terminal."""
    bounds = [0, *sorted(cut for cut in cuts if 0 < cut < len(ids)), len(ids)]
    told = []
    for steps in (
        [ids[i : i + 1] for i in range(len(ids))],
        [ids[a:b] for a, b in pairwise(bounds)],
    ):
        emitted: list[Event] = []
        asked, subject = sequence(), answer(tokenizer, emitted, stop)
        subject.take(Queued(asked))
        found = [subject.take(Emitted(asked, [Sampled(id_) for id_ in step], 1.0)) for step in steps]
        assert sum(found) <= 1
        subject.take(Failed(asked, ValueError("x")) if failing else Ended(asked, "length"))
        ends = [event for event in emitted if isinstance(event, Done | Error)]
        assert len(ends) == 1
        assert emitted[-1] is ends[0]
        assert subject.over
        if any(found):
            assert isinstance(ends[0], Done)
            assert ends[0].finish_reason == "stop"
        else:
            assert isinstance(ends[0], Error) == failing
        told.append(emitted)
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("failure", "ours"),
    [
        (RuntimeError("no words"), True),
        (TokenizerError("no words"), False),
        (Overloaded("no words"), False),
        (LogitsError("no words"), False),
    ],
)
def test_an_answer_that_fails_ends_alone(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
    ours: bool,
) -> None:
    """Its own request gets an error; requests beside it notice nothing. Only faults of ours have a traceback."""
    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        expected = text_of(node, prompt(1, new=8))[:2]
        say = Answer._say

        def breaks(subject: Answer, sampled: Sampled) -> bool:
            if subject._prompt_tokens == 40 and subject._completion_tokens == 3:
                raise failure
            return say(subject, sampled)

        monkeypatch.setattr(Answer, "_say", breaks)
        events: list[Event] = []
        node.submit(prompt(0, new=20), events.append)
        assert text_of(node, prompt(1, new=8))[:2] == expected
        node.drain(PATIENCE_S)
        assert isinstance(events[-1], Error)
        assert "no words" in events[-1].message
        assert node.status().models[0].running == 0
    assert "an answer failed" in caplog.text
    assert ("Traceback" in caplog.text) == ours


def test_an_answer_that_fails_at_its_end_says_so(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its terminal message is an error; without one, its client would wait for ever."""
    emitted: list[Event] = []
    asked, subject = sequence(), answer(tokenizer, emitted, [])

    def broken() -> str:
        raise RuntimeError("no words")

    monkeypatch.setattr(subject._detokenizer, "flush", broken)
    with pytest.raises(RuntimeError) as raised:
        subject.take(Ended(asked, "length"))
    subject.fail(raised.value)
    assert [type(event) for event in emitted] == [Error]


def test_closing_tells_what_is_left_and_ends_the_thread() -> None:
    answering = Answering()
    assert answering.alive
    answering.close(PATIENCE_S)
    answering.close(PATIENCE_S)
    assert not answering.alive


def test_timings_are_those_of_the_clock(tokenizer: Tokenizer) -> None:
    """A prompt of 12 tokens, 4 of them cached; five tokens of which the last two come together."""
    emitted: list[Event] = []
    asked = Sequence(list(range(10, 22)), 90, Sampler(SamplingParams(), []), cached_tokens=4)
    asked.times = Times(arrived_s=10.0, admitted_s=11.0, first_token_s=13.0, last_token_s=15.0, stall_s=0.5)
    subject = answer(tokenizer, emitted, [])
    for ids, at_s in (([30], 13.0), ([31], 13.5), ([32], 14.0), ([33, 34], 15.0)):
        subject.take(Emitted(asked, [Sampled(id_) for id_ in ids], at_s))
    subject.take(Ended(asked, "length"))
    (done,) = (event for event in emitted if isinstance(event, Done))
    assert done.timings == Timings(
        queue_s=1.0,
        ttft_s=3.0,
        prefill_s=2.0,
        decode_s=2.0,
        stall_s=0.5,
        prefill_tokens_per_s=4.0,
        decode_tokens_per_s=2.0,
    )


def test_what_was_computed_after_a_stop_string_does_not_count(tokenizer: Tokenizer) -> None:
    emitted: list[Event] = []
    asked = sequence()
    asked.times = Times(arrived_s=1.0, admitted_s=1.0, first_token_s=2.0, last_token_s=9.0)
    stop = tokenizer.decode([31])
    subject = answer(tokenizer, emitted, [stop])
    assert not subject.take(Emitted(asked, [Sampled(30)], 2.0))
    assert subject.take(Emitted(asked, [Sampled(31), Sampled(32)], 3.0))
    assert not subject.take(Emitted(asked, [Sampled(33)], 9.0))
    subject.take(Ended(asked, "length"))
    (done,) = (event for event in emitted if isinstance(event, Done))
    assert (done.finish_reason, done.usage.completion_tokens, done.timings.decode_s) == ("stop", 2, 1.0)


def test_guesses_after_a_stop_string_do_not_count(tokenizer: Tokenizer) -> None:
    """Of the tokens of a step the first was not guessed; those after the stop string are not part of the answer."""
    emitted: list[Event] = []
    asked = sequence()
    subject = answer(tokenizer, emitted, [tokenizer.decode([32])])
    assert not subject.take(Emitted(asked, [Sampled(30)], 2.0))
    assert subject.take(Emitted(asked, [Sampled(31), Sampled(32), Sampled(33), Sampled(34)], 3.0))
    asked.drafted_tokens = asked.accepted_tokens = 9
    subject.take(Ended(asked, "length"))
    (done,) = (event for event in emitted if isinstance(event, Done))
    assert (done.usage.completion_tokens, done.usage.accepted_tokens) == (3, 1)


@pytest.mark.parametrize("asked", [False, True])
def test_an_answer_that_only_repeats_itself_ends_if_that_is_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """It has what was said until then, and the engine is told."""
    monkeypatch.setattr("shoal.models.tokenizer.repetition.LOOK_TOKENS", 4)
    monkeypatch.setattr(
        "shoal.engine.engine._following", lambda chunk, logits: [Sampled(65)] if chunk.samples else []
    )
    with Node(replace(CONFIG, max_guesses=0)) as node:
        node.load(Load(model=str(path)))
        text, ids, done = text_of(node, prompt(0, new=50, stop_repeating=asked, context_tokens=60))
        assert (done.finish_reason, len(ids)) == ("length", 20)
        text, ids, done = text_of(node, prompt(0, tokens=10, new=80, stop_repeating=asked))
        assert (done.finish_reason, len(ids)) == (("repetition", 48) if asked else ("length", 80))
        assert (ids, done.usage.completion_tokens) == ([65] * len(ids), len(ids))
        assert text == node._models.pick("").tokenizer.decode(ids)  # type: ignore[union-attr]
        node.drain(PATIENCE_S)
        assert node.status().models[0].running == 0
