"""Ranks that take turns on processors: what was tried of sums counts instead of what links tell."""

from __future__ import annotations

import multiprocessing

import pytest
from fakes.throughput.throughput_cases import device, spec, wanted, weighed
from harness import taking_turns
from harness.taking_turns import SumWaits, Waits, in_turns

from shoal.partition.group_choice import Choice
from shoal.partition.sum_cost import Network, sent_s
from shoal.partition.throughput.group_plans import Groups, links_of, machines_of
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.profile import Overheads, Profile, ProfileLink, SweptLaw
from shoal.partition.throughput.rank_laws import RankLaws

MODEL = weighed(spec())
NAMES = "a", "b", "c", "d"


OWN = Overheads(swept=SweptLaw((1e-3, 1e-1), (1e-4, 2e-3)))
JOB = Job(16, 8)
SUMS = 2 * len(MODEL.spec.layers)


def group(job: Job = JOB) -> tuple[Groups, Choice, Profile]:
    links = tuple(ProfileLink((one, other), 1e-3, 1e12) for one in NAMES for other in NAMES if one < other)
    profile = Profile(tuple(device(name=name, overheads=OWN) for name in NAMES), links)
    groups = Groups(MODEL, wanted(MODEL.spec), profile, job, ("f32",))
    choice = groups.of(4)
    assert isinstance(choice, Choice)
    assert choice.figures.overlap_rows > job.prompt_tokens
    return groups, choice, profile


def waits(begin_s: float, slope: float = 0.0) -> SumWaits:
    law = Waits((0.0, 1.0), (begin_s, begin_s + slope))
    return {"star": law, "exchange": law, "sliced": law}


def test_a_sum_that_takes_what_links_tell_changes_nothing() -> None:
    groups, choice, profile = group()
    usual = groups.cost(choice)
    fixed = RankLaws(profile.head, MODEL, "f16").fixed(choice.ranks[0].share)
    means = choice.figures.decode
    network = Network(machines_of(profile, MODEL, "f16"), links_of(profile), range(4))
    assert means is not None
    assert fixed.way_s > 0
    told_s = network.sum_s(means, 1, MODEL.spec.hidden) + sent_s(MODEL.spec, fixed, means, 1) / SUMS
    found = in_turns(usual, choice, profile, MODEL, JOB, 2.0, waits(told_s))
    assert found.token_s == pytest.approx(usual.token_s)
    more = in_turns(usual, choice, profile, MODEL, JOB, 2.0, waits(told_s + 1e-3))
    assert more.token_s == pytest.approx(usual.token_s + SUMS * 1e-3)
    assert more.ttft_s == pytest.approx(found.ttft_s + SUMS * 1e-3)
    assert more.tokens_per_s == pytest.approx(1 / more.token_s)
    assert more.binding == "network"
    assert sum(more.parts.values()) == pytest.approx(sum(usual.parts.values()) + SUMS * 1e-3)
    assert sum(more.prompt_parts.values()) == pytest.approx(more.ttft_s)
    assert (
        more.parts["overhead"] < usual.parts["overhead"]
    )  # what calls cost behind kernels is in what was tried


def test_a_batch_s_step_waits_as_often_as_a_token_and_sends_more() -> None:
    """What was tried is of one row; the bytes of the others take what links tell."""
    eight = JOB._replace(batch=8, guesses=1, chance=0.5)
    groups, choice, profile = group(eight)
    usual = groups.cost(choice)
    less, more = (in_turns(usual, choice, profile, MODEL, eight, 1.0, waits(it)) for it in (1e-3, 2e-3))
    assert (more.token_s - less.token_s) * eight.step_tokens == pytest.approx(SUMS * 1e-3)
    assert more.tokens_per_s == pytest.approx(8 / more.token_s)
    for found in (less, more):
        assert sum(found.parts.values()) == pytest.approx(found.token_s * eight.step_tokens)


def test_what_a_sum_takes_goes_with_what_each_rank_computes_before_it() -> None:
    groups, choice, profile = group()
    usual = groups.cost(choice)
    flat, two, four = (
        in_turns(usual, choice, profile, MODEL, JOB, turns, waits(1e-3, slope))
        for turns, slope in ((2.0, 0.0), (2.0, 0.5), (4.0, 0.5))
    )
    computed_s = flat.token_s - SUMS * 1e-3
    assert two.token_s - flat.token_s == pytest.approx(0.5 * computed_s / 2)
    assert four.token_s - flat.token_s == pytest.approx(0.5 * computed_s / 4)
    assert two.ttft_s - flat.ttft_s == pytest.approx(0.5 * (flat.ttft_s - SUMS * 1e-3) / 2)
    alone = in_turns(usual, choice, profile, MODEL, JOB, 1.0, waits(1e-3, 0.5))
    assert alone.token_s - flat.token_s == pytest.approx(0.5 * computed_s)
    assert alone.ttft_s == usual.ttft_s, "sums of many rows are what links tell"


def test_a_rank_that_dies_or_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = multiprocessing.Pipe()
    monkeypatch.setattr(taking_turns, "TRIED_S", 0.01)
    with pytest.raises(TimeoutError, match="has said nothing"):
        taking_turns._heard(near)
    far.close()
    with pytest.raises(EOFError):
        taking_turns._heard(near)
