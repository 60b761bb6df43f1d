"""Experts change places between the steps of an engine that is never idle: the hot ones come to the device within a
bounded number of steps, exchanging takes a small share of the time, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.listening import Heard, Listener
from fakes.on_device import TakingTime, executor_of, logits, sim, with_blocks_on
from fakes.running import FP32, Running, relative_error

from shoal.engine.engine import EXCHANGING, Engine
from shoal.engine.errors import DeviceGone
from shoal.engine.executor import Executor
from shoal.engine.learn.expert_use import LEAST_USES
from shoal.engine.learn.speeds import Speeds
from shoal.engine.rank import Rank
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence
from shoal.kernels import routing
from shoal.kernels.arrays import Floats
from shoal.kernels.homes import cpu
from shoal.models.sampling import Sampler, SamplingParams
from shoal.offload.kv.prefix_cache import PrefixCache
from shoal.partition.memory_layout import PAGE_TOKENS
from shoal.partition.spec import BlockId

LAYERS = 4
HOT = {4, 5}
CPU_S = 0.02  # that experts of a layer take it
APART = 1e-5  # of the largest logit: sums of experts in another order
FAST, SLOW = 16e9, 1e6  # bytes per second of a link


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp("mixture") / "m"
    tiny.save_hf(tiny.hf_model("qwen2_moe", num_hidden_layers=LAYERS), path)
    return Running(path, replace(FP32, kv_tokens=1 << 13))


@pytest.fixture
def skewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers prefer the hot experts."""
    plain = routing.route

    def preferring(scores: Floats, count: int, normalize: bool) -> routing.Routing:
        liked = scores.copy()
        liked[:, list(HOT)] += 100
        return plain(liked, count, normalize)

    routed_by(monkeypatch, preferring)


@pytest.fixture
def uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers choose by chance."""
    source = np.random.default_rng(7)

    def chosen(scores: Floats, count: int, normalize: bool) -> routing.Routing:
        experts = source.permuted(np.tile(np.arange(scores.shape[1]), (len(scores), 1)), axis=1)[:, :count]
        return routing.Routing.of(experts, np.full(experts.shape, 1 / count, np.float32))

    routed_by(monkeypatch, chosen)


def routed_by(monkeypatch: pytest.MonkeyPatch, route: Callable[..., routing.Routing]) -> None:
    monkeypatch.setattr(routing, "route", route)
    monkeypatch.setattr(type(cpu()), "route", lambda _, *operands: route(*operands))


class Loaded:
    """An engine of a mixture, some of whose experts are on a device, on the clock of the device. Between its steps
    new requests come: it is never idle."""

    def __init__(self, running: Running, link_bytes_per_s: float = FAST, staged: bool = False) -> None:
        self.running = running
        self.device, self.home = sim(link_bytes_per_s=link_bytes_per_s)
        plan = with_blocks_on(running.plan, some_experts)
        if staged:
            plan = replace(plan, staged_experts=2, staged_tokens=30)
        self.executor = executor_of(running, plan, self.home, TakingTime(self.device, CPU_S))
        self.engine = Engine(self.rank_of(self.executor), scheduler_of(self.executor), self.clock)
        self.listener = Listener(self.engine)
        self.heard: list[Heard] = []
        self.exchanges: list[float] = []  # how long they took
        self._source = np.random.default_rng(3)
        plain = self.executor.exchange_experts

        def timed() -> bool:
            began_s = self.device.now_s
            done = plain()
            if done:
                self.exchanges.append(self.device.now_s - began_s)
            return done

        self.executor.exchange_experts = timed  # type: ignore[method-assign]

    def clock(self) -> float:
        return self.device.now_s

    def rank_of(self, executor: Executor) -> Rank:
        return Rank(executor, self.clock)

    def ask(self, prompt: int = 12, new: int = 30) -> Sequence:
        tokens = self._source.integers(0, self.running.spec.vocab, prompt).tolist()
        sequence = Sequence(tokens, prompt + new, Sampler(SamplingParams(temperature=0.0), tokens))
        self.heard.append(self.listener.submit(sequence))
        return sequence

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            while len(self.engine.scheduler.running) + len(self.engine.scheduler.waiting) < 3:
                self.ask()
            assert self.engine.step()
            self.listener.listen()

    def there(self) -> set[BlockId]:
        return {it for it, home in self.executor.experts._homes.items() if home is self.home}


def dense(block: BlockId) -> bool:
    return block.kind not in ("embed", "expert")


def some_experts(block: BlockId) -> bool:
    return dense(block) or (block.kind == "expert" and block.expert in (0, 1, 2))


def scheduler_of(executor: Executor) -> Scheduler:
    cache = PrefixCache(executor.kv.table, PAGE_TOKENS)
    return Scheduler(cache, sequences=3, queue=4, chunk_tokens=32, guesses=0)


HOT_ONES = {BlockId("expert", layer, expert) for layer in range(LAYERS) for expert in HOT}


@pytest.mark.parametrize("link", [FAST, SLOW])
def test_hot_experts_come_to_the_device(running: Running, skewed: None, link: float) -> None:
    loaded = Loaded(running, link)
    expected = logits(running.executor)
    assert relative_error(logits(loaded.executor), expected) < APART
    loaded.step(4)
    held, peak = loaded.device.budget.held_bytes, loaded.device.budget.peak_bytes
    began_s, steps = loaded.device.now_s, 0
    while not loaded.there() >= HOT_ONES:
        loaded.step()
        steps += 1
        # One pair changes places between two steps at most, and exchanging has its share of the time.
        assert len(loaded.exchanges) <= steps
        spent_s, last_s = loaded.device.now_s - began_s, max(loaded.exchanges, default=0.0)
        assert sum(loaded.exchanges) <= EXCHANGING * spent_s + last_s
        assert steps < 2 * LEAST_USES + len(HOT_ONES) + len(HOT_ONES) * last_s / EXCHANGING / CPU_S
    assert len(loaded.exchanges) == len(HOT_ONES)
    assert (steps > 3 * LEAST_USES) == (link == SLOW)
    loaded.step(40)
    assert len(loaded.exchanges) == len(HOT_ONES)
    assert len(loaded.there()) == 3 * LAYERS
    assert loaded.device.budget.peak_bytes == peak
    assert loaded.device.budget.held_bytes == held
    assert relative_error(logits(loaded.executor), expected) < APART
    assert not any(heard.error for heard in loaded.heard)


def test_where_all_are_used_alike_they_stay(running: Running, uniform: None) -> None:
    loaded = Loaded(running)
    loaded.step(300)
    assert len(loaded.exchanges) <= 1


@pytest.mark.parametrize("error", ["lost", "other"])
def test_an_exchange_that_fails_halfway_ends_no_answer(running: Running, skewed: None, error: str) -> None:
    """Its tokens so far stay, and the others are those that they would have been."""
    loaded = Loaded(running)
    plain, calls = loaded.home.exchange, 0

    def fails(*matrices: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            if error == "other":
                raise ValueError("something else")
            loaded.device.lose("it fell off")
        plain(*matrices)

    loaded.home.exchange = fails  # type: ignore[method-assign]
    with pytest.raises(DeviceGone, match="it fell off" if error == "lost" else "experts stuck halfway"):
        loaded.step(100)
    engine = loaded.engine
    assert isinstance(engine.lost, DeviceGone)
    loaded.listener.listen()
    under_way = list(engine.scheduler.running)
    assert under_way
    before = [list(one.tokens) for one in under_way]
    assert not engine.step()
    engine.settle()
    alone = executor_of(running, running.plan, loaded.home)
    engine.start_anew(
        Rank(alone, loaded.clock), PrefixCache(alone.kv.table, PAGE_TOKENS), Speeds(32, None, 1)
    )
    while engine.busy:
        engine.step()
        loaded.listener.listen()
    assert not any(heard.error for heard in loaded.heard)
    assert [one.tokens[: len(tokens)] for one, tokens in zip(under_way, before, strict=True)] == before
    assert all(len(heard.tokens) == 30 for heard in loaded.heard)


def test_after_steps_that_are_given_up(running: Running, skewed: None) -> None:
    """Experts that were coming to the device for such a step may be those that change places after it."""
    loaded = Loaded(running, staged=True)
    while not loaded.exchanges:
        loaded.step()
    engine, plain, came = loaded.engine, loaded.home.stage, 0

    def stage(*operands: Any) -> None:
        nonlocal came
        came += 1
        plain(*operands)
        loaded.device.now_s += CPU_S
        end_all()

    def end_all() -> None:
        for one in [*engine.scheduler.running, *engine.scheduler.waiting]:
            engine.end(one, "cancelled")

    loaded.home.stage = stage  # type: ignore[method-assign]
    for steps in range(1, len(HOT_ONES)):  # one pair has changed places
        end_all()
        loaded.ask(prompt=40)
        assert engine.step()
        loaded.listener.listen()
        assert came == steps  # and nothing was computed after that
    assert loaded.there() >= HOT_ONES
    loaded.home.stage = plain  # type: ignore[method-assign]
    assert relative_error(logits(loaded.executor), logits(running.executor)) < APART
