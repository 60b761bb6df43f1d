"""Ranks that take turns on processors: what was tried of sums counts instead of what links tell."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
from fakes.throughput.throughput_cases import device, spec, wanted, weighed
from harness import taking_turns
from harness.taking_turns import Waits, in_turns

from shoal.partition.group_choice import Choice
from shoal.partition.throughput.group_plans import Groups
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.profile import Profile, ProfileLink

MODEL = weighed(spec())
NAMES = "a", "b", "c", "d"


@pytest.mark.parametrize("waited_s", [1e-4, 2e-3])
def test_each_sum_takes_what_was_tried(waited_s: float) -> None:
    links = tuple(ProfileLink((one, other), 1e-3, 1e12) for one in NAMES for other in NAMES if one < other)
    profile = Profile(tuple(replace(device(), name=name) for name in NAMES), links)
    job = Job(16, 8)
    groups = Groups(MODEL, wanted(MODEL.spec), profile, job, ("f32",))
    choice = groups.of(4)
    assert isinstance(choice, Choice)
    usual = groups.cost(choice)
    waits = {it: Waits((0.0, 1.0), (waited_s, waited_s)) for it in ("star", "exchange", "sliced")}
    found = in_turns(usual, choice, profile, MODEL, job, 2.0, waits)  # type: ignore[arg-type]
    sums, ends_s = 2 * len(MODEL.spec.layers), 3e-3
    alone_s = usual.token_s - choice.figures.network_s
    assert found.token_s == pytest.approx(alone_s + sums * waited_s, abs=ends_s)
    assert found.tokens_per_s == pytest.approx(1 / found.token_s)
    assert found.parts["network"] - usual.parts["network"] == pytest.approx(found.token_s - usual.token_s)
    assert found.ttft_s - usual.ttft_s == pytest.approx(found.prompt_parts["network"])


def test_a_rank_that_dies_or_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = multiprocessing.Pipe()
    monkeypatch.setattr(taking_turns, "TRIED_S", 0.01)
    with pytest.raises(TimeoutError, match="has said nothing"):
        taking_turns._heard(near)
    far.close()
    with pytest.raises(EOFError):
        taking_turns._heard(near)
