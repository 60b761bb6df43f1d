"""The node with a tiny real model: what it answers to requests, alone and together, and to bad ones."""

from __future__ import annotations

import gc
import re
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from fakes.asking import CONFIG, GREEDY, prompt, text_of

from shoal.comm.messages import (
    Accepted,
    Chat,
    ChatMessage,
    Done,
    Error,
    Generate,
    Load,
    Sampling,
    Token,
    Tokenize,
    Unload,
)
from shoal.daemon.backend import Event
from shoal.daemon.errors import DaemonError
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.daemon.memory import PROCESS
from shoal.daemon.node import Node
from shoal.daemon.sizes import parse_bytes
from shoal.engine.batch import Batch
from shoal.engine.engine import Engine
from shoal.engine.sequence import Sequence
from shoal.kernels.arrays import Floats


def test_a_stream_is_accepted_tokens_done(node: Node) -> None:
    events = list(node.stream(prompt(0, new=5)))
    assert [type(event) for event in events] == [Accepted, *[Token] * (len(events) - 2), Done]
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.finish_reason, done.usage.prompt_tokens, done.usage.completion_tokens) == ("length", 40, 5)
    assert done.timings.ttft_s > 0
    assert done.context_tokens == 96


def test_eight_together_answer_as_one_after_the_other(node: Node) -> None:
    requests = [prompt(i) for i in range(8)]
    alone = [text_of(node, request)[:2] for request in requests]
    together: list[tuple[str, list[int]]] = [("", [])] * 8

    def ask(i: int) -> None:
        together[i] = text_of(node, requests[i])[:2]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert together == alone
    assert len({str(ids) for _, ids in alone}) == 8


def test_a_second_turn_computes_only_what_is_new(node: Node, path: Path) -> None:
    first = prompt(0, new=20)
    _, ids, done = text_of(node, first)
    assert done.usage.cached_tokens == 0
    second = Generate(
        prompt_tokens=[*(first.prompt_tokens or []), *ids, 9, 8], sampling=GREEDY, max_tokens=10
    )
    _, again, done = text_of(node, second)
    assert done.usage.cached_tokens == 40 + 19  # the last token of an answer is never computed
    node.unload(Unload())
    node.load(Load(model=str(path)))
    _, afresh, done = text_of(node, second)
    assert (afresh, done.usage.cached_tokens) == (again, 0)


def test_preempted_answers_are_those_given_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that turn out longer than any before fill four pages with four sequences that need two each."""
    config = replace(CONFIG, context_tokens=128, kv_tokens=256)
    sampling = [GREEDY, Sampling(temperature=1.0, seed=5, repetition_penalty=1.2)]

    def ask(node: Node, number: int) -> list[int]:
        ids = [(7 * number + 13 * i) % 250 for i in range(50 + number)]
        request = Generate(
            prompt_tokens=ids, sampling=sampling[number % 2], max_tokens=60, ignore_eos=True, model=str(path)
        )
        return text_of(node, request)[1]

    with Node(config) as node:
        alone = [ask(node, number) for number in range(4)]
    with Node(config) as node:
        node.load(Load(model=str(path)))
        engine = next(iter(node._models)).engine
        for _ in range(256):
            engine.scheduler.admission._lengths.note(1)
        submit, step, everyone, arrived = engine.submit, engine.step, threading.Event(), count(1)

        def submitted(sequence: Sequence) -> None:
            submit(sequence)
            if next(arrived) == 4:
                everyone.set()

        monkeypatch.setattr(engine, "submit", submitted)
        monkeypatch.setattr(engine, "step", lambda: everyone.wait(30) and step())
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(lambda number: ask(node, number), range(4)))
        assert node.status().models[0].preemptions_total > 0
    assert together == alone


def test_a_pool_smaller_than_the_context_bounds_requests(path: Path) -> None:
    with Node(replace(CONFIG, kv_tokens=64)) as node:
        node.load(Load(model=str(path)))
        for request in (prompt(0, tokens=70, new=3), prompt(0, tokens=40, new=40)):
            with pytest.raises(DaemonError, match=r"may reach \d+, the KV pool holds 64") as caught:
                text_of(node, request)
            assert caught.value.code == "resources"
        open_ended = Generate(prompt_tokens=[5] * 40, sampling=GREEDY, ignore_eos=True)
        done = text_of(node, open_ended)[2]
        assert (done.finish_reason, done.usage.completion_tokens) == ("length", 24)


def test_a_deadline_ends_an_answer_with_what_it_has(path: Path) -> None:
    ticks = count()
    config = replace(CONFIG, max_guesses=0)
    with Node(config, clock=lambda: float(next(ticks))) as node:  # a step takes two seconds
        node.load(Load(model=str(path)))
        done = text_of(node, prompt(0, new=50, deadline_s=60.0))[2]
    assert done.finish_reason == "deadline"
    assert 1 <= done.usage.completion_tokens < 40


def test_same_seed_same_text(node: Node) -> None:
    def ask(seed: int | None) -> list[int]:
        return text_of(
            node, Generate(prompt="the cat", sampling=Sampling(temperature=1.0, seed=seed), max_tokens=20)
        )[1]

    assert ask(5) == ask(5)
    assert len({str(ask(seed)) for seed in range(4)}) > 1


def test_stop_strings_and_stop_tokens_end_the_text(node: Node) -> None:
    text, ids, _ = text_of(node, prompt(1))
    middle = text[len(text) // 2 : len(text) // 2 + 3]
    stopped, _, done = text_of(node, prompt(1, stop=[middle]))
    assert stopped == text[: text.index(middle)]
    assert done.finish_reason == "stop"
    _, fewer, done = text_of(node, prompt(1, stop_token_ids=[ids[4]]))
    assert fewer == ids[: ids.index(ids[4])]
    assert done.finish_reason == "stop"


def test_log_probabilities_are_reported(node: Node) -> None:
    request = Generate(
        prompt="the", sampling=Sampling(temperature=0.0, logprobs=3), max_tokens=4, ignore_eos=True
    )
    tokens = [e for e in node.stream(request) if isinstance(e, Token) and e.ids]
    for token in tokens:
        (entry,) = token.logprobs
        assert entry.id == token.ids[0] == entry.top[0][0]
        assert entry.logprob <= 0
        assert len(entry.top) == 3


def test_closing_the_stream_cancels(node: Node) -> None:
    stream = node.stream(prompt(0, new=50))
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    node.drain(30)
    (status,) = node.status().models
    assert (status.running, status.waiting, status.kv_used_tokens) == (0, 0, 0)


def test_cancel_twice_gives_one_terminal_message(node: Node) -> None:
    events: list[Event] = []
    ended = threading.Event()

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, Done | Error):
            ended.set()

    cancel = node.submit(prompt(0, new=50), emit).cancel
    cancel()
    cancel()
    assert ended.wait(30)
    assert [type(e) for e in events].count(Done) == 1
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "cancelled"


@pytest.mark.parametrize(
    ("request_", "code", "match"),
    [
        (Generate(prompt_tokens=[]), "bad_request", "empty"),
        (Generate(prompt_tokens=[100_000]), "bad_request", "100000"),
        (Generate(prompt_tokens=[1] * 96), "context_overflow", "96 tokens"),
        (Generate(prompt="a", model="nowhere/x.gguf"), "not_found", "x.gguf"),
        (Generate(prompt="a", sampling=Sampling(logit_bias={90_000: 1.0})), "bad_request", "90000"),
    ],
)
def test_bad_requests_get_a_code_and_a_figure(node: Node, request_: Generate, code: str, match: str) -> None:
    with pytest.raises(DaemonError, match=match) as caught:
        list(node.stream(request_))
    assert caught.value.code == code
    assert text_of(node, prompt(0, new=3))[2].finish_reason == "length"


def test_a_prompt_longer_than_the_context_is_told_what_would_hold_it(path: Path) -> None:
    with Node(replace(CONFIG, context_tokens=48)) as node:
        node.load(Load(model=str(path)))
        with pytest.raises(DaemonError) as caught:
            list(node.stream(Generate(prompt_tokens=[1] * 60)))
        assert caught.value.code == "context_overflow"
        figures = re.search(r"`context_tokens=(\d+)`, which takes ([\d.]+ [MG]B) ", caught.value.hint)
        assert figures is not None
        context, needed_bytes = int(figures[1]), parse_bytes(figures[2])
        process_bytes = node.budget.held_by(PROCESS)
        with pytest.raises(DaemonError, match="the context holds") as caught:
            list(node.stream(Generate(prompt_tokens=[1] * 9000)))
        assert "was made for" in caught.value.hint
    slack_bytes = 64 << 20  # the process is measured anew
    config = replace(CONFIG, context_tokens=context, kv_tokens=None)
    enough = replace(config, memory_bytes=process_bytes + needed_bytes + slack_bytes)
    with Node(enough) as node:
        assert list(node.stream(Generate(prompt_tokens=[1] * 60, model=str(path))))
    short = replace(config, memory_bytes=process_bytes + needed_bytes - slack_bytes)
    with Node(short) as node, pytest.raises(DaemonError, match="needs"):
        node.load(Load(model=str(path)))


def test_a_failing_step_fails_its_requests_and_the_node_serves_on(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = next(iter(node._models)).engine
    with monkeypatch.context() as patch:

        def broken(*arguments: object) -> Floats:
            raise RuntimeError("device on fire")

        patch.setattr(engine.rank.executor, "forward", broken)
        with pytest.raises(DaemonError, match="device on fire") as caught:
            list(node.stream(prompt(0)))
        assert caught.value.code == "internal"
    assert text_of(node, prompt(0, new=3))[2].finish_reason == "length"


def test_a_step_that_cannot_be_chosen_fails_all_requests_and_the_node_serves_on(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = next(iter(node._models)).engine
    with monkeypatch.context() as patch:

        def broken(now_s: float) -> Batch:
            raise RuntimeError("out of order")

        patch.setattr(engine.scheduler, "next", broken)
        events: list[Event] = []
        cancel = node.submit(prompt(0), events.append).cancel
        node._answering.wait(20)
        cancel()
        assert isinstance(events[-1], Error)
        assert "out of order" in events[-1].message
    assert text_of(node, prompt(0, new=3))[2].finish_reason == "length"


def test_deadlines_that_cannot_be_looked_at_fail_all_requests_and_are_looked_at_again(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also while a step runs, whoever does the looking."""
    model = next(iter(node._models))
    engine = model.engine
    monkeypatch.setattr("shoal.daemon.regular_looks.EVERY_S", 0.005)

    def broken(*_: object) -> Any:
        raise RuntimeError("out of time")

    events: list[Event] = []
    with engine._stepping:  # as in the middle of a step
        node.submit(prompt(0), events.append)
        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler, "expire", broken)
            node._answering.wait(20)
        assert isinstance(events[-1], Error)
        assert "out of time" in events[-1].message
        with monkeypatch.context() as patch:
            patch.setattr(model, "look_back", broken)
            node.submit(prompt(0, deadline_s=0.05), events.append)
            node._answering.wait(20)
        assert isinstance(events[-1], Done)
        assert events[-1].finish_reason == "deadline"
    assert text_of(node, prompt(0, new=3))[2].finish_reason == "length"
    assert 1 <= caplog.text.count("a regular look failed") <= 2


def test_a_step_whose_deadlines_cannot_be_looked_at_fails_its_requests(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = next(iter(node._models)).engine
    with monkeypatch.context() as patch:
        patch.setattr("shoal.daemon.regular_looks.EVERY_S", 60.0)

        def broken(now_s: float) -> Any:
            raise RuntimeError("out of time")

        patch.setattr(engine.scheduler, "expire", broken)
        with pytest.raises(DaemonError, match="out of time"):
            list(node.stream(prompt(0)))
    assert text_of(node, prompt(0, new=3))[2].finish_reason == "length"


def test_a_request_that_cannot_be_queued_leaves_no_answer(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopping would wait for one that was left."""
    engine = next(iter(node._models)).engine

    def broken(sequence: Sequence) -> None:
        raise RuntimeError("no queue")

    monkeypatch.setattr(engine, "submit", broken)
    with pytest.raises(DaemonError, match="no queue"):
        node.submit(prompt(0), lambda event: None)
    assert not node._answering._answers


def test_a_model_that_is_loaded_while_the_node_closes_goes_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Node(CONFIG) as node:
        load = node._loader.load

        def closing(*arguments: Any) -> LoadedModel:
            model = load(*arguments)
            node.close()
            return model

        monkeypatch.setattr(node._loader, "load", closing)
        with pytest.raises(DaemonError) as caught:
            node.load(Load(model=str(path)))
        assert caught.value.code == "shutting_down"
        assert not list(node._models)
        assert node.budget.held_by("model " + path.name) == 0


def test_a_step_that_nobody_wants_any_more_is_given_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a long prompt may take seconds, and one that waits for a slow disk minutes."""
    model = next(iter(node._models))
    expected = text_of(node, prompt(1, new=3))[0]
    began, go_on, blocks = threading.Event(), threading.Event(), []
    with monkeypatch.context() as patch:
        transformer = model.executor.model
        attend, feed_forward = transformer.attend, transformer.feed_forward

        def slow(*arguments: Any) -> Floats:
            began.set()
            assert go_on.wait(20)
            return attend(*arguments)

        def noted(*arguments: Any) -> Floats:
            blocks.append(arguments)
            return feed_forward(*arguments)

        patch.setattr(transformer, "attend", slow)
        patch.setattr(transformer, "feed_forward", noted)
        ended: list[Event] = []
        cancel = node.submit(prompt(0), ended.append).cancel
        assert began.wait(20)
        cancel()
        node._answering.wait(20)
        assert isinstance(ended[-1], Done)
        assert ended[-1].finish_reason == "cancelled"
        go_on.set()
        assert model.engine._stepping.acquire(timeout=20)
        model.engine._stepping.release()
        assert not blocks
    assert text_of(node, prompt(1, new=3))[0] == expected


def test_all_models_together_get_a_bounded_time_to_keep_their_kv(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def close(engine: Engine, keep_s: float) -> None:
        given.append(keep_s)
        time.sleep(0.2)

    with Node(CONFIG) as node:
        for name in ("one", "two", "three"):
            node.load(Load(model=str(shutil.copy(path, tmp_path / f"{name}.gguf"))))
        monkeypatch.setattr(Engine, "close", close)
    assert len(given) == 3
    assert all(later <= earlier - 0.2 for earlier, later in pairwise(given))


def test_an_emit_that_raises_ends_its_request_and_keeps_nothing(node: Node) -> None:
    def emit(event: Event) -> None:
        raise RuntimeError("nobody home")

    node.submit(prompt(0), emit)

    def emit_later(event: Event) -> None:
        if not isinstance(event, Accepted):
            raise RuntimeError("gone")

    node.submit(prompt(1), emit_later)
    assert text_of(node, prompt(2, new=8))[2].finish_reason == "length"
    node.drain(30)
    (status,) = node.status().models
    assert (status.running, status.waiting, status.kv_used_tokens) == (0, 0, 0)


def test_nan_logits_fail_one_request(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = next(iter(node._models)).engine.rank.executor
    head = executor.head
    monkeypatch.setattr(executor, "head", lambda hidden: head(hidden) * float("nan"))
    with pytest.raises(DaemonError, match="logits"):
        list(node.stream(prompt(0)))


def test_tokenize_both_ways(node: Node) -> None:
    tokens = node.tokenize(Tokenize(text="the cat"))
    assert node.tokenize(Tokenize(tokens=tokens.ids)).text == "the cat"
    chat = node.tokenize(Tokenize(messages=[ChatMessage(role="user", content="hi")]))
    assert "hi" in chat.text
    with pytest.raises(DaemonError, match="99999"):
        node.tokenize(Tokenize(tokens=[99_999]))


def test_chat_uses_the_template(node: Node) -> None:
    request = Chat(messages=[ChatMessage(role="user", content="hello")], sampling=GREEDY, max_tokens=4)
    assert text_of(node, request)[2].usage.prompt_tokens > 5
    with pytest.raises(DaemonError, match="template_args"):
        list(node.stream(Chat(messages=request.messages, template_args={"messages": []})))


def test_draining_refuses_and_closing_ends_everything(path: Path) -> None:
    node = Node(CONFIG)
    node.load(Load(model=str(path)))
    node.drain(1)
    with pytest.raises(DaemonError) as caught:
        list(node.stream(prompt(0)))
    assert caught.value.code == "shutting_down"
    node.close()
    node.close()


def test_a_request_that_is_refused_is_gone_at_once(node: Node) -> None:
    """Not only when the garbage collector comes: a batch may have many long ones."""

    class Held(str):
        pass

    text = Held("the end " * 500)
    held = weakref.ref(text)
    gc.disable()
    try:
        with suppress(DaemonError):
            node.submit(Generate(prompt=text), lambda event: None)
        del text
        assert held() is None
    finally:
        gc.enable()
