"""Which plan is chosen, and why; and that more never makes the choice worse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes.throughput.throughput_cases import MB, MIXED, device, spec, weighed
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.amounts import format_bytes, meets
from shoal.partition.throughput.explain import changes, reason, runner_up
from shoal.partition.throughput.group_plans import speeds_with
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.profile import ANY, Overheads, Profile, ProfileLink, RowsLaw
from shoal.partition.throughput.solve import Choices, Solved, asks, solve
from shoal.partition.throughput.weights_of import Weighed

JOB = Job(256, 64)
LONG = spec(24)
DENSE, FEWER = weighed(LONG), weighed(LONG, 0.5625, "Q4_0", "q4")
CABLE = ProfileLink((ANY, ANY), 1e-4, 117e6)


def solved(models: list[Weighed], profile: Profile, job: Job = JOB, choices: Choices = Choices()) -> Solved:  # noqa: B008
    return solve(models, asks(job, None, 256, 1, 0), profile, job, choices)


def one(memory: float, **more: float) -> Profile:
    return Profile((device(memory_bytes=memory, **more),))


def name(found: Solved) -> str:
    assert found.chosen is not None
    return found.chosen.name


def test_what_fits_stays_in_memory() -> None:
    found = solved([DENSE, FEWER], one(16e9))
    assert name(found) == "memory"
    assert "memory-bound" in reason(found)
    assert "4 bits would give" in reason(found)


def test_what_does_not_fit_streams_and_the_sentence_says_what_memory_would_give() -> None:
    found = solved([DENSE, FEWER], one(0.6 * DENSE.weights_bytes))
    assert name(found).startswith("stream")
    said = reason(found)
    assert said.startswith("disk-bound")
    assert "more memory would give" in said
    assert " times" in said


def test_the_runner_up_gives_the_same_texts() -> None:
    found = solved([DENSE, FEWER], one(0.6 * DENSE.weights_bytes))
    second = runner_up(found)
    assert second is not None
    assert found.chosen is not None
    assert second.model is DENSE
    assert second.name != found.chosen.name
    assert f"{second.name} would take" in reason(found)
    alone = solved([DENSE, FEWER], one(16e9))
    assert runner_up(alone) is None
    assert "would take" not in reason(alone)


@pytest.mark.parametrize(("times", "unsure"), [(0.9, True), (1.05, True), (3.0, False)])
def test_plans_that_differ_by_more_than_their_bands_can_be_told_apart(times: float, unsure: bool) -> None:
    """Also where a token takes both as long, as a long prompt may not."""
    found = solved([DENSE], one(0.6 * DENSE.weights_bytes))
    chosen, second = found.chosen, runner_up(found)
    assert chosen is not None
    assert second is not None
    its = chosen.prediction
    later = replace(its, ttft_s=its.ttft_s + (times - 1) * its.total_s(found.job))
    said = reason(found._replace(candidates=(chosen, replace(second, prediction=later))))
    assert f"{second.name} would take" in said
    assert ("less than predictions can tell apart" in said) is unsure


def test_bits_are_not_taken_unasked() -> None:
    found = solved([DENSE, FEWER], one(0.6 * DENSE.weights_bytes))
    assert found.chosen is not None
    assert found.chosen.model is DENSE
    assert any(it.model is FEWER and it.fits and it.prediction.token_s < 1e-1 for it in found.candidates)
    only = solved([DENSE, FEWER], one(0.6 * DENSE.weights_bytes, disk_bytes_per_s=0.0))
    assert name(only) == "memory, q4"


def test_nothing_fits() -> None:
    found = solved([DENSE], one(100e6))
    assert found.chosen is None
    said = reason(found)
    assert "the smallest machine that could run it has" in said
    least = min(it.least_bytes for it in found.candidates)
    assert name(solved([DENSE], one(least + MB)))
    assert solved([DENSE], one(least - 2 * MB)).chosen is None


def test_what_a_machine_needs_for_pages_on_their_way_to_disk_is_said() -> None:
    """A command that keeps none there names less."""
    assert "on their way" not in reason(solved([DENSE], one(100e6)))
    buffered = replace(DENSE, buffers={"f16": 30 * MB, "i8": 20 * MB})
    said = reason(solved([buffered], one(100e6), choices=Choices(kv_type="f16")))
    assert f"{format_bytes(30 * MB)} of it for K and V on their way to disk)" in said
    assert said.endswith("; shoal run keeps none there, and so needs less")


def test_the_smallest_machine_where_only_a_disk_lacks() -> None:
    """Streaming needs less memory than this machine has."""
    found = solved(
        [DENSE], one(0.6 * DENSE.weights_bytes, disk_bytes_per_s=0.0), choices=Choices(kv_type="f16")
    )
    assert found.chosen is None
    assert "a disk to stream from is missing" in reason(found)
    least = min(it.least_bytes for it in found.candidates)
    assert least < 0.3 * DENSE.weights_bytes + 100e6
    assert name(solved([DENSE], one(least + MB))).startswith("stream")


def test_several_machines_are_a_group() -> None:
    machines = Profile(tuple(device(name=str(i), memory_bytes=16e9) for i in range(3)), (CABLE,))
    found = solved([weighed(spec(32, hidden=4096, ffn=14336, heads=32, head_dim=128))], machines)
    names = [it.name for it in found.candidates]
    assert {"memory", "group of 2", "group of 3"} <= set(names)
    assert name(found).startswith("group of")
    assert found.chosen is not None
    assert len(found.chosen.prediction.peak_bytes) > 1
    alone = solved([DENSE], machines, choices=Choices(ranks=1))
    assert all(not it.name.startswith("group") for it in alone.candidates)


def test_prompts_by_several_machines_are_a_plan_where_links_are_quick_but_far() -> None:
    """As a daemon would choose: answers as alone, first tokens sooner."""
    far = ProfileLink((ANY, ANY), 2.5e-3, 125e6)
    machines = Profile(tuple(device(name=str(i), flops=2e10) for i in range(2)), (far,))
    found = solved([weighed(spec(16, hidden=2048, ffn=5632, heads=32))], machines)
    named = {it.name: it for it in found.candidates}
    both, alone = named["prompts by 2"].prediction, named["memory"].prediction
    assert both.token_s == pytest.approx(alone.token_s, rel=0.02)
    assert both.ttft_s < 0.9 * alone.ttft_s
    assert name(found) == "prompts by 2"


def test_machines_of_a_group_are_as_fast_as_their_tables_say() -> None:
    """A type that takes twice as long with many rows makes the group's first token later."""

    def machines(slow: float) -> Profile:
        law = RowsLaw("BF16", 1e6, (1, 256), (5e-11, slow * 2.56e-9))
        return Profile(tuple(device(name=str(i), products=(law,)) for i in range(2)), (CABLE,))

    quick, slow = (
        solved([DENSE], machines(times), choices=Choices(ranks=2)).candidates[0] for times in (1, 2)
    )
    assert slow.prediction.ttft_s > 1.5 * quick.prediction.ttft_s
    assert slow.prediction.token_s == pytest.approx(quick.prediction.token_s, rel=0.05)
    assert speeds_with(machines(1).head, DENSE) == (pytest.approx(2e10), pytest.approx(1e11, rel=0.01))


def test_fixed_costs_of_a_group_are_those_of_its_head() -> None:
    one_ms = Overheads(step_s=1e-3, layer_s=1e-3, mixture_s=1e-3)

    def token_s(model: Weighed, **more: Any) -> float:
        machines = Profile(tuple(device(name=str(i), **more) for i in range(2)), (CABLE,))
        return solved([model], machines, choices=Choices(ranks=2)).candidates[0].prediction.token_s

    layers = len(LONG.layers)
    guessed = Overheads()
    more_s = 1e-3 - guessed.step_s + layers * (1e-3 - guessed.layer_s)
    assert token_s(DENSE, overheads=one_ms) - token_s(DENSE) == pytest.approx(more_s, rel=1e-3)
    mixed = token_s(MIXED, overheads=replace(guessed, mixture_s=1e-3)) - token_s(MIXED)
    assert mixed == pytest.approx(len(MIXED.spec.layers) * (1e-3 - guessed.mixture_s), rel=1e-3)


def test_machines_that_are_not_linked_are_no_group() -> None:
    machines = Profile(tuple(device(name=str(i)) for i in range(2)))
    assert name(solved([DENSE], machines)) == "memory"


def test_what_would_meet_a_target() -> None:
    profile = one(0.6 * DENSE.weights_bytes)
    found = solved([DENSE, FEWER], profile)
    assert found.chosen is not None
    target = 5 * found.chosen.prediction.tokens_per_s
    ways = changes([DENSE, FEWER], asks(JOB, None, 256, 1, 0), profile, found, Choices(), target)
    assert "4 bits" in ways[0].what
    assert any("more memory" in way.what for way in ways)
    assert all(meets(way.tokens_per_s, target) for way in ways)


def test_fixing_one_choice_leaves_the_others_open() -> None:
    found = solved([DENSE, FEWER], one(16e9), choices=Choices(kv_type="i8"))
    assert {it.kv_type for it in found.candidates} == {"i8"}
    assert {it.model.quant for it in found.candidates} == {"keep", "q4"}
    assert name(found) == "memory"


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([DENSE, MIXED]), st.floats(0.15, 1.3), st.floats(1.0, 2.0), st.integers(1, 4))
def test_more_memory_never_makes_the_choice_worse(
    model: Weighed, share: float, times: float, batch: int
) -> None:
    job = replace_job(batch)
    less, more = (solved([model], one(share * it * model.weights_bytes + 100e6), job) for it in (1.0, times))
    if less.chosen is not None:
        assert more.chosen is not None
        assert more.chosen.prediction.total_s(job) <= 1.05 * less.chosen.prediction.total_s(job)


def replace_job(batch: int) -> Job:
    return JOB._replace(batch=batch)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([DENSE, MIXED]),
    st.floats(0.2, 1.3),
    st.sampled_from(["memory_bytes_per_s", "flops", "disk_bytes_per_s"]),
    st.floats(1.05, 4.0),
)
def test_faster_machines_never_make_the_choice_worse(
    model: Weighed, share: float, figure: str, times: float
) -> None:
    slow = one(share * model.weights_bytes + 100e6)
    fast = replace(slow, devices=(replace(slow.head, **{figure: times * getattr(slow.head, figure)}),))
    before, after = solved([model], slow), solved([model], fast)
    if before.chosen is not None:
        assert after.chosen is not None
        # The simpler plan may be taken where it is hardly slower.
        assert after.chosen.prediction.total_s(JOB) <= 1.035 * before.chosen.prediction.total_s(JOB)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([DENSE, MIXED]),
    st.floats(0.3, 1.3),
    st.floats(1e-5, 5e-3),
    st.floats(1e7, 5e9),
    st.sampled_from(["latency_s", "bytes_per_s"]),
    st.floats(1.05, 10.0),
)
def test_faster_links_never_make_the_choice_worse(
    model: Weighed, share: float, latency_s: float, bytes_per_s: float, figure: str, times: float
) -> None:
    link = ProfileLink((ANY, ANY), latency_s, bytes_per_s)
    better = {figure: getattr(link, figure) * (times if figure == "bytes_per_s" else 1 / times)}
    memory = share * model.weights_bytes + 150e6
    machines = tuple(device(name=str(i), memory_bytes=memory) for i in range(3))
    before, after = (solved([model], Profile(machines, (it,))) for it in (link, replace(link, **better)))
    if before.chosen is not None:
        assert after.chosen is not None
        assert after.chosen.prediction.total_s(JOB) <= 1.035 * before.chosen.prediction.total_s(JOB)


def test_peaks_never_exceed_the_memory_of_a_plan_that_fits() -> None:
    for share in (0.2, 0.5, 0.9, 1.2):
        memory = share * DENSE.weights_bytes + 100e6
        for found in solved([DENSE, FEWER], one(memory)).candidates:
            assert (found.least_bytes <= memory) == found.fits, found.name
            assert found.prediction.peak_bytes["one"] <= found.least_bytes


def test_the_same_figures_give_the_same_choice() -> None:
    one_, other = (reason(solved([DENSE, FEWER], one(1e9))) for _ in range(2))
    assert one_ == other


def test_several_machines_that_were_insisted_on_and_cannot_are_told_why() -> None:
    apart = Profile(tuple(device(name=str(i)) for i in range(2)))
    found = solved([DENSE], apart, choices=Choices(ranks=2))
    assert not found.candidates
    assert reason(found) == "no group of these machines can run it: the head does not reach it"
    ways = changes([DENSE], asks(JOB, None, 256, 1, 0), apart, found, Choices(ranks=2), 1e-3)
    assert [way.what for way in ways] == ["another machine like the first, by a gigabit cable"]
    small = Profile(
        tuple(device(name=str(i), memory_bytes=300e6, disk_bytes_per_s=0.0) for i in range(2)), (CABLE,)
    )
    assert "there are" in reason(solved([DENSE], small, choices=Choices(ranks=2)))


@pytest.mark.parametrize("byte_s", [1e-16, 1.0])
def test_tables_that_no_machine_has_give_plans_all_the_same(byte_s: float) -> None:
    law = RowsLaw("*", 1.0, (1, 256), (byte_s, byte_s))
    machines = Profile(tuple(device(name=str(i), products=(law,)) for i in range(2)), (CABLE,))
    for model in (DENSE, MIXED):
        found = solved([model], machines)
        assert {"memory", "group of 2"} <= {it.name for it in found.candidates}
        assert all(0 < it.prediction.token_s < 1e12 for it in found.candidates)


def test_the_smallest_machines_are_told_apart_by_what_differs() -> None:
    """Where K and V alone have fewer bits, weights are not said to."""
    found = solved([FEWER], one(20e6, disk_bytes_per_s=0.0), Job(4096, 64))
    said = reason(found)
    assert "K and V in i8" in said
    assert said.endswith("with K and V in f16")
    both = solved([DENSE, FEWER], one(20e6, disk_bytes_per_s=0.0), Job(4096, 64))
    assert reason(both).endswith("with the weights as they are stored")


@pytest.mark.parametrize("ranks", [None, 1, 2])
def test_what_would_meet_a_target_beside_the_quickest_disk_that_there_can_be(ranks: int | None) -> None:
    """A disk that is thought to be many times as quick is no figure to refuse."""
    small = tuple(device(name=str(i), memory_bytes=3e8, disk_bytes_per_s=1e14) for i in range(2))
    machines, choices = Profile(small, (CABLE,)), Choices(ranks=ranks)
    found = solved([DENSE], machines, choices=choices)
    assert found.candidates
    for target in (1.0, 1e9):
        ways = changes([DENSE], asks(JOB, None, 256, 1, 0), machines, found, choices, target)
        assert all(meets(way.tokens_per_s, target) for way in ways)
