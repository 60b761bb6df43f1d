"""Speculation changes no token: every answer equals the one given without it, whatever the sampling."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from fakes import tiny
from fakes.listening import Heard, Listener

from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.loading.assembly import Assembly
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.engine.batch import Batch
from shoal.engine.guess.drafter import _likeliest
from shoal.engine.sequence import Sequence
from shoal.kernels import set_threads
from shoal.kernels.arrays import Floats
from shoal.models.sampling import Sampler, SamplingParams
from shoal.models.step import Step
from shoal.offload.budget import Budget

CONFIG = NodeConfig(kv_type="f32", kv_tokens=1024, context_tokens=128, chunk_tokens=16, max_sequences=4)
GREEDY = SamplingParams(temperature=0.0)
SAMPLINGS = {
    "greedy": GREEDY,
    "drawn": SamplingParams(temperature=0.7, seed=3),
    "narrow": SamplingParams(temperature=1.2, top_k=5, top_p=0.9, min_p=0.05, seed=4),
    "penalised": SamplingParams(
        temperature=0.3, repetition_penalty=1.2, presence_penalty=0.2, frequency_penalty=0.1, seed=5
    ),
    "biased": SamplingParams(temperature=0.5, logit_bias={7: 4.0, 9: 4.5}, seed=6, logprobs=3),
}


class Answer(NamedTuple):
    ids: list[int]
    logprobs: list[float]
    ended: list[str]
    drafted: int
    accepted: int

    @classmethod
    def of(cls, sequence: Sequence, heard: Heard) -> Answer:
        """`ids` with the token that ended it."""
        ids = sequence.tokens[sequence.prompt_tokens :]
        logprobs = [one.logprob for one in heard.sampled]
        return cls(ids, logprobs, heard.ended, sequence.drafted_tokens, sequence.accepted_tokens)


class Clock:
    """It ticks at every reading, so all steps take equally long, and guesses cost nothing."""

    def __init__(self, tick_s: float = 1.0) -> None:
        self.now_s = 0.0
        self.tick_s = tick_s

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


def load(path: Path, guesses: int, draft: Path | None = None) -> LoadedModel:
    set_threads(1)
    config = replace(CONFIG, max_guesses=guesses)
    model = Assembly(Budget(1 << 30), clock=Clock()).load("tiny", path, config, draft=draft)
    if draft is not None:
        model.engine._drafter._clock = Clock(0.01)  # much faster than the model that it guesses for
    return model


def prompt(seed: int) -> list[int]:
    """Random phrases, some of them repeated; the model's random weights decide how it goes on."""
    source = random.Random(seed)
    phrase = [source.randrange(200) for _ in range(9)]
    return phrase + [source.randrange(200) for _ in range(5)] + phrase[: source.randrange(2, 9)]


def answers(
    model: LoadedModel,
    jobs: Ordered[tuple[list[int], SamplingParams, int | None]],
    new_tokens: int = 70,
    meanwhile: Callable[[], object] = lambda: None,
) -> tuple[list[Answer], int]:
    """The answer to each job when all run together, and how many steps that took; `meanwhile` runs between steps."""
    listener = Listener(model.engine)
    heard: list[tuple[Sequence, Heard]] = []
    for ids, params, stop_at in jobs:
        stop_ids = frozenset() if stop_at is None else frozenset([stop_at])
        sequence = Sequence(list(ids), len(ids) + new_tokens, Sampler(params, ids), stop_ids)
        heard.append((sequence, listener.submit(sequence)))
    steps = listener.run(meanwhile)
    assert not any(one.error for _, one in heard)
    return [Answer.of(*pair) for pair in heard], steps


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_says_the_same(family: str, tmp_path: Path) -> None:
    path = tiny.save_hf(tiny.hf_model(family, seed=2), tmp_path / "m")
    plain, ahead = load(path, 0), load(path, 32)
    (expected,), _ = answers(plain, [(prompt(0), GREEDY, None)])
    (found,), _ = answers(ahead, [(prompt(0), GREEDY, None)])
    assert found.ids == expected.ids
    assert found.drafted


@pytest.mark.parametrize("name", SAMPLINGS)
def test_every_sampling_says_the_same(name: str, tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama", seed=8), tmp_path / "m.gguf")
    plain, ahead = load(path, 0), load(path, 32)
    drafted = 0
    for seed in range(4):
        jobs = [(prompt(seed), SAMPLINGS[name], None)]
        (expected,), _ = answers(plain, jobs)
        (found,), _ = answers(ahead, jobs)
        assert found.ids == expected.ids
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5, nan_ok=True)
        assert found.ended == expected.ended == ["length"]
        drafted += found.drafted
    assert drafted


def test_together_they_say_the_same_in_fewer_steps(tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("qwen2", seed=8), tmp_path / "m.gguf")
    jobs = [(prompt(seed), params, None) for seed, params in enumerate(SAMPLINGS.values())]
    jobs += [(prompt(9), GREEDY, None), (prompt(10), GREEDY, None)]
    expected, steps = answers(load(path, 0), jobs)
    found, fewer = answers(load(path, 32), jobs)
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert fewer < steps
    assert all(one.accepted for one in found[-2:])
    assert all(one.accepted <= min(one.drafted, len(one.ids) - 1) for one in found)


def test_a_prompt_gets_rows_before_guesses_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the step that reads its end also has guesses."""
    path = tiny.save_gguf(tiny.hf_model("qwen2", seed=8), tmp_path / "m.gguf")
    scheduler = (model := load(path, 32)).engine.scheduler
    ids = [7 * i % 90 for i in range(60)]
    asked = Sequence(ids, 61, Sampler(GREEDY, ids))
    steps: list[tuple[bool, int]] = []  # is some of the prompt left to read, tokens guessed
    plan = scheduler.next

    def watched(now_s: float) -> Batch:
        batch = plan(now_s)
        left = asked.running and max(0, asked.remaining - sum(c.rows for c in batch.chunks[batch.decodes :]))
        steps.append((bool(left), sum(len(chunk.draft) for chunk in batch.chunks)))
        return batch

    monkeypatch.setattr(scheduler, "next", watched)
    answers(
        model, [(prompt(9), GREEDY, None)], meanwhile=lambda: len(steps) == 12 and model.engine.submit(asked)
    )
    reading = [guessed for left, guessed in steps if left]
    assert len(reading) >= 60 // CONFIG.chunk_tokens
    assert not any(reading)
    assert any(guessed for _, guessed in steps)


def test_ends_within_a_draft(tmp_path: Path) -> None:
    """A stop token that was guessed ends the answer there; the limit is never passed."""
    path = tiny.save_gguf(tiny.hf_model("llama", seed=8), tmp_path / "m.gguf")
    plain, ahead = load(path, 0), load(path, 32)
    (whole,), _ = answers(plain, [(prompt(0), GREEDY, None)])
    for new_tokens in (1, 2, 3, 37, 69):
        (found,), _ = answers(ahead, [(prompt(0), GREEDY, None)], new_tokens)
        assert (found.ids, found.ended) == (whole.ids[:new_tokens], ["length"])
    for stop_at in sorted(set(whole.ids)):
        (found,), _ = answers(ahead, [(prompt(0), GREEDY, stop_at)])
        assert found.ids == whole.ids[: whole.ids.index(stop_at) + 1]
        assert found.ended == ["stop"]
        assert found.accepted < len(found.ids)
    assert ahead.engine.scheduler.cache.used_pages == 0


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_draft_model_changes_no_token(name: str, tmp_path: Path) -> None:
    """The same model drafts for itself, in a coarser type: right most of the time, wrong now and then."""
    tiny.save_gguf(tiny.hf_model("llama", seed=8), path := tmp_path / "m.gguf")
    tiny.save_gguf(tiny.hf_model("llama", seed=8), small := tmp_path / "small.gguf", type="Q4_0")
    jobs = [(prompt(seed), SAMPLINGS[name], None) for seed in range(3)]
    expected, steps = answers(load(path, 0), jobs)
    ahead = load(path, 32, draft=small)
    for _ in range(2):  # the second time with what the small model's cache knows by then
        found, fewer = answers(ahead, jobs)
        assert [one.ids for one in found] == [one.ids for one in expected]
    if name == "greedy":  # else random weights are too unsure for guesses to be sent
        assert fewer < 0.7 * steps
        assert sum(one.drafted for one in found) > sum(one.accepted for one in found) > 0


def test_a_draft_model_of_another_family_and_length(tmp_path: Path) -> None:
    """It guesses badly, reads long prompts in pieces, and follows while sequences come, go and are preempted."""
    path = tiny.save_hf(tiny.hf_model("qwen3", seed=2), tmp_path / "m")
    small = tiny.save_gguf(tiny.hf_model("llama", seed=3), tmp_path / "small.gguf")
    jobs = [(prompt(seed) * 2, GREEDY, None) for seed in range(5)]
    expected, _ = answers(load(path, 0), jobs)
    ahead = load(path, 32, draft=small)
    scheduler = ahead.engine.scheduler
    steps = iter(range(1, 1000))

    def interrupt() -> None:
        if next(steps) in (10, 15, 16):
            scheduler._preempt(scheduler.running[-1])

    found, _ = answers(ahead, jobs, meanwhile=interrupt)
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert scheduler.totals.preemptions == 3
    assert sum(one.drafted for one in found)


def test_answers_do_without_a_draft_model_that_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.save_gguf(tiny.hf_model("llama", seed=8), path := tmp_path / "m.gguf")
    jobs = [(prompt(seed), GREEDY, None) for seed in range(3)]
    expected, _ = answers(load(path, 0), jobs)
    model = load(path, 32, draft=path)
    executor = model.engine._drafter._rank.executor
    forward, steps = executor.forward, iter(range(1000))

    def breaks(step: Step, wanted: Callable[[float], bool]) -> Floats:
        if next(steps) == 4:
            raise MemoryError("no room")
        return forward(step, wanted)

    executor.forward = breaks  # type: ignore[method-assign]
    found, _ = answers(model, jobs)
    assert [(one.ids, one.ended) for one in found] == [(one.ids, ["length"]) for one in expected]
    assert [record.getMessage() for record in caplog.records] == [
        "the draft model failed and is not asked again: MemoryError: no room"
    ]
    assert next(steps) == 5


def test_tokens_that_a_draft_model_does_not_have(tmp_path: Path) -> None:
    """A text that has such a token gets no guesses from the small model; texts beside it do."""
    vocab = len(tiny.TOKENS)
    path = tiny.save_gguf(tiny.hf_model("llama", seed=8, vocab_size=vocab + 9), tmp_path / "m.gguf")
    small = tiny.save_gguf(tiny.hf_model("llama", seed=8), tmp_path / "small.gguf")
    stranger = SamplingParams(temperature=0.0, logit_bias={vocab + 3: 1.0})
    jobs = [
        ([*prompt(0), vocab + 8, 5], GREEDY, None),
        (prompt(1), GREEDY, None),
        (prompt(2), stranger, None),
    ]
    expected, _ = answers(load(path, 0), jobs)
    found, _ = answers(load(path, 32, draft=small), jobs)
    assert [one.ids for one in found] == [one.ids for one in expected]


@pytest.mark.parametrize(
    ("logits", "likeliest"), [([1, 8, 2], (1, 9)), ([0, 0, 0], (0, 3)), ([-3e38, 3e38], (1, 9))]
)
def test_the_likeliest_token_and_how_likely_it_is(logits: list[float], likeliest: tuple[int, int]) -> None:
    assert _likeliest(np.array(logits, np.float32)) == likeliest


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_of_broken_logits_no_token_is_likely(bad: float) -> None:
    assert _likeliest(np.array([1, bad, 2], np.float32)) == (1, 0)


def test_a_draft_model_must_speak_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    monkeypatch.setattr(
        tiny, "TOKENS", [*tiny.TOKENS[:20], tiny.TOKENS[21], tiny.TOKENS[20], *tiny.TOKENS[22:]]
    )
    other = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "other.gguf")
    budget = Budget(1 << 30)
    with pytest.raises(
        DaemonError, match=r"other\.gguf has another vocabulary than tiny: token 20"
    ) as caught:
        Assembly(budget).load("tiny", path, CONFIG, draft=other)
    assert caught.value.code == "unsupported"
    assert budget.held_bytes == 0
