"""What a request is told while nothing comes: its place in the queue, its prompt, a disk; and seldom enough."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fakes.asking import CONFIG, prompt, text_of
from fakes.fake_engine import FakeEngine, scheduler, sequence

from shoal.comm.messages import Accepted, Done, Load, Stage, Token
from shoal.daemon.backend import STAGE_S
from shoal.daemon.node import Node
from shoal.daemon.server.in_flight import Flight, Peer
from shoal.daemon.underway import Underway
from shoal.engine.executor import Executor


class FakeModel:
    """A model whose engine is a scheduler, with a clock of its own. `disk` is what its store tells."""

    def __init__(self, **limits: Any) -> None:
        self.engine = scheduler(**limits)
        self.steps = FakeEngine(self.engine, lambda rows: rows / 10)
        self.plan = Mock(chunk_tokens=16)
        self.disk: Stage | None = None

    def clock(self) -> float:
        return self.steps.now_s

    def stage(self) -> Stage | None:
        return self.disk

    def ask(self, *arguments: Any, **fields: Any) -> Underway:
        asked = sequence(*arguments, **fields)
        self.steps.submit(asked)
        return Underway(self, asked)  # type: ignore[arg-type]


def test_a_prompt_is_told_with_its_speed() -> None:
    model = FakeModel(chunk=16)
    asked = model.ask(list(range(40)), 3)
    told = [asked.stage()]
    for _ in range(2):
        model.steps.step()
        told.append(asked.stage())
    assert told == [
        Stage(doing="prompt", done=0, total=40),
        Stage(doing="prompt", done=16, total=40, tokens_per_s=10.0),
        Stage(doing="prompt", done=32, total=40, tokens_per_s=10.0),
    ]
    model.steps.step()
    assert asked.stage() is None  # the next token comes with the next step


def test_who_waits_is_told_the_place_in_the_queue() -> None:
    model = FakeModel(sequences=1)
    first = model.ask(20, 3)
    model.steps.step()
    second, third = model.ask([2] * 20, 3), model.ask([3] * 20, 3, priority=1)
    assert second.stage() == Stage(doing="queued", done=2, total=2)
    assert third.stage() == Stage(doing="queued", done=1, total=2)
    model.steps.step()  # the higher priority interrupts
    assert third.stage() is None or third.stage().doing == "prompt"  # type: ignore[union-attr]
    assert first.stage() == Stage(doing="queued", done=1, total=2)
    model.steps.run()


def test_a_disk_is_told_where_one_pass_takes_the_whole_prompt() -> None:
    model = FakeModel(chunk=16)
    model.disk = Stage(doing="reading", done=3, total=9, bytes_per_s=1e9)
    short = model.ask(10, 3)
    assert short.stage() == model.disk
    model.steps.step()
    assert short.stage() == model.disk  # for each token of the answer, too
    long = model.ask([5] * 40, 3)
    model.steps.step()
    told = long.stage()
    assert told is not None
    assert (told.doing, told.total, told.bytes_per_s) == ("prompt", 40, 1e9)


def test_a_node_tells_it_to_who_asks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take long, and waits for events end at once. What came before in the conversation counts as read."""
    monkeypatch.setattr("shoal.daemon.node.STAGE_S", 1e-4)
    go_on = Executor._go_on
    monkeypatch.setattr(Executor, "_go_on", lambda executor: (time.sleep(0.01), go_on(executor)))
    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        text_of(node, prompt(0, tokens=80, new=1))
        for known, asked in ((0, prompt(1, tokens=83, new=1)), (64, prompt(0, tokens=90, new=1))):
            request = {name: getattr(asked, name) for name in ("prompt_tokens", "sampling", "max_tokens")}
            events = list(node.stream(type(asked)(**request, progress=True)))
            stages = [event for event in events if isinstance(event, Stage) and event.doing == "prompt"]
            assert stages, "the answer came too fast to be told anything"
            done = [stage.done for stage in stages]
            assert done == sorted(done)
            assert {stage.total for stage in stages} == {len(asked.prompt_tokens or [])}
            assert max(done) >= known
        assert not [event for event in node.stream(prompt(2)) if isinstance(event, Stage)]


def test_at_most_one_stage_a_second_and_none_after_the_end() -> None:
    flight = Flight(Peer(Mock(), b"c", "c"), b"1", "generate", 0.0, lambda flight: None)
    told = Stage(doing="prompt", done=1, total=9)
    flight.attach(lambda: None, lambda: told)
    sent = []
    for tick in range(400):
        now_s = tick / 20
        message = flight.sign_of_life(now_s, keepalive_s=2.0)
        if message is not None:
            assert isinstance(message, Stage)
            sent.append(now_s)
            flight.sent_s = now_s
    assert len(sent) <= 20 / STAGE_S
    assert STAGE_S >= 0.25
    flight.emit(Accepted(model="m", prompt_tokens=9))
    flight.emit(Token(text="x", ids=[1]))
    flight.emit(Done(finish_reason="stop", usage=Mock(), timings=Mock()))
    assert flight.watch is None
