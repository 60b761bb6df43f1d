"""What is said of plans: what binds, what would meet a target, at which price."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes.throughput.throughput_cases import FREE, MIXED, device, spec, weighed

from shoal.partition.amounts import meets
from shoal.partition.throughput.cost import cost
from shoal.partition.throughput.explain import Change, changes, reason, worth_a_look
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.profile import ANY, Accelerator, Profile, ProfileLink
from shoal.partition.throughput.solve import Choices, Solved, asks, solve
from shoal.partition.throughput.weights_of import Weighed

LONG = spec(24)
DENSE, FEWER = weighed(LONG), weighed(LONG, 0.5625, "Q4_0", "q4")
CABLE = ProfileLink((ANY, ANY), 1e-5, 1e10)
JOB = Job(256, 64)


def solved(models: list[Weighed], profile: Profile, job: Job = JOB, choices: Choices = Choices()) -> Solved:  # noqa: B008
    return solve(models, asks(job, None, 256, 1, 0), profile, job, choices)


def changed(
    models: list[Weighed],
    profile: Profile,
    target: float,
    job: Job = JOB,
    choices: Choices = Choices(),  # noqa: B008
) -> list[Change]:
    found = solved(models, profile, job, choices)
    return changes(models, asks(job, None, 256, 1, 0), profile, found, choices, target)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_what_binds_is_what_being_faster_would_help(batch: int) -> None:
    job, machine = JOB._replace(batch=batch), device(memory_bytes=64e9, overheads=FREE)
    plan = solved([DENSE], Profile((machine,)), job).candidates[0].plan
    assert plan is not None
    now = cost(DENSE, plan, machine, job)
    gains = {
        "memory": cost(DENSE, plan, replace(machine, memory_bytes_per_s=2 * machine.memory_bytes_per_s), job),
        "compute": cost(DENSE, plan, replace(machine, flops=2 * machine.flops), job),
    }
    best = max(gains, key=lambda part: gains[part].tokens_per_s)
    assert now.binding == best
    assert gains[best].tokens_per_s > 1.2 * now.tokens_per_s


def test_a_step_of_a_batch_reads_the_experts_that_it_wakes() -> None:
    profile = Profile((device(memory_bytes=64e9, overheads=FREE),))
    alone, many = (reason(solved([MIXED], profile, JOB._replace(batch=it))) for it in (1, 4))
    assert "a token reads" in alone
    assert "a step reads" in many
    sizes = [float(it.partition("reads ")[2].split()[0]) for it in (alone, many)]
    assert 1.5 * sizes[0] < sizes[1] < 4 * sizes[0]


def test_a_plan_that_meets_a_target_is_told_before_anything_is_bought() -> None:
    """Weights that pass through a device read prompts quickly, and give tokens slowly."""
    there = Accelerator("gpu", 0.5 * DENSE.weights_bytes, 100e9, 50e12, 5e9, step_s=0.0, layer_s=0.0)
    machine = device(memory_bytes=64e9, overheads=FREE, flops=2e11, accelerators=(there,))
    profile, job = Profile((machine,)), Job(8000, 16)
    found = solved([DENSE], profile, job)
    assert found.chosen is not None
    assert "through gpu" in found.chosen.name
    slow = found.chosen.prediction.tokens_per_s
    quick = max(it.prediction.tokens_per_s for it in found.candidates if it.fits and it.kv_type == "f16")
    assert quick > 1.5 * slow
    first, *_ = changed([DENSE], profile, (slow + quick) / 2, job)
    assert "with which the first token comes after" in first.what
    assert first.tokens_per_s == quick


def test_fewer_bits_and_memory_together_where_neither_would_do() -> None:
    profile = Profile((device(memory_bytes=0.3 * FEWER.weights_bytes, overheads=FREE),))
    found = solved([DENSE, FEWER], profile)
    quick = max(it.prediction.tokens_per_s for it in found.candidates if it.model is FEWER)
    (both,) = changed([DENSE, FEWER], profile, 0.99 * quick)
    assert both.what.startswith("weights in 4 bits and ")
    assert both.what.endswith(" more memory")


def test_groups_count_with_fewer_bits_and_with_what_is_bought_for_them() -> None:
    machine = device(memory_bytes=0.8 * DENSE.weights_bytes, overheads=FREE)
    profile = Profile((machine, replace(machine, name="two")), (CABLE,))
    names = {it.name for it in solved([DENSE, FEWER], profile).candidates if it.fits}
    assert {"group of 2", "group of 2, q4"} <= names
    found = solved([DENSE], profile)
    assert found.chosen is not None
    assert found.chosen.name == "group of 2"
    said = [it.what for it in changed([DENSE], profile, 1.2 * found.chosen.prediction.tokens_per_s)]
    assert any("more machine" in it or "another machine" in it for it in said)
    assert "together" in reason(found)
    alone = changed([DENSE], profile, 1e9, choices=Choices(ranks=1))
    assert not any("machine" in it.what for it in alone)


def test_what_is_bought_does_what_is_said_of_it() -> None:
    """Amounts are rounded up to what is said."""
    profile = Profile((device(memory_bytes=0.6 * DENSE.weights_bytes, overheads=FREE),))
    found = solved([DENSE], profile)
    assert found.chosen is not None
    for times in (1.1, 1.3, 1.7, 2.3):
        target = times * found.chosen.prediction.tokens_per_s
        ways = changed([DENSE], profile, target, choices=Choices(ranks=1))
        its = [it for it in ways if it.what.endswith("more memory")]
        assert its
        for change in its:
            value, unit, *_ = change.what.split()
            more = float(value) * {"MB": 1e6, "GB": 1e9}[unit]
            there = replace(profile.head, memory_bytes=profile.head.memory_bytes + more)
            reached = solved([DENSE], Profile((there,))).chosen
            assert reached is not None
            assert meets(reached.prediction.tokens_per_s, target)


def test_more_memory_is_said_of_the_plan_that_needs_least_of_it() -> None:
    there = Accelerator("gpu", 0.6 * DENSE.weights_bytes, 400e9, 50e12, 5e9, step_s=0.0, layer_s=0.0)
    machine = device(memory_bytes=0.2 * DENSE.weights_bytes, overheads=FREE, accelerators=(there,))
    found = solved([DENSE], Profile((machine,)))
    lacking = [it for it in found.candidates if it.lacks_memory and it.asked]
    said = reason(found)
    whole, there_too = (
        next(it for it in lacking if it.name.startswith(kind)) for kind in ("memory", "on gpu")
    )
    assert there_too.least_bytes < whole.least_bytes
    assert there_too.missing.replace(" of ", " more ") + " would give" in said


def test_one_token_is_a_first_one() -> None:
    """Then nothing is said of how fast further ones would come."""
    said = reason(solved([DENSE, FEWER], Profile((device(memory_bytes=64e9, flops=1e10),)), Job(512, 1)))
    assert "would give" not in said


@pytest.mark.parametrize("share", [0.31, 0.43, 0.57, 0.68, 0.77, 0.89])
def test_with_what_is_said_to_be_missing_a_plan_fits(share: float) -> None:
    head = device(memory_bytes=share * DENSE.weights_bytes, overheads=FREE)
    before = solved([DENSE], Profile((head,))).candidates[0]
    assert before.lacks_memory
    value, unit, *_ = before.missing.split()
    more = float(value) * {"MB": 1e6, "GB": 1e9}[unit]
    grown = replace(head, memory_bytes=head.memory_bytes + more)
    assert solved([DENSE], Profile((grown,))).candidates[0].fits


def test_worth_a_look_is_the_choice_and_the_best_of_each_other_kind() -> None:
    there = Accelerator("gpu", 0.5 * DENSE.weights_bytes, 100e9, 50e12, 5e9, step_s=0.0, layer_s=0.0)
    head = device(memory_bytes=0.4 * DENSE.weights_bytes, overheads=FREE, accelerators=(there,))
    profile = Profile((head, *(replace(head, name=name, accelerators=()) for name in "abc")), (CABLE,))
    found = solved([DENSE, FEWER], profile)
    few = worth_a_look(found)
    names = [it.name for it in few]
    assert few[0] is found.chosen
    assert all(it.fits for it in few)
    assert len(set(names)) == len(names) < len(found.candidates) / 3
    kinds = {_kind(name) for name in names}
    assert {_kind(it.name) for it in found.candidates if it.fits and it.asked} == kinds
    (fewer,) = (it for it in few if it.model is FEWER)
    assert fewer is few[-1]
    alone = solved([FEWER], profile).chosen
    assert alone is not None
    assert fewer.prediction == alone.prediction


def test_worth_a_look_where_nothing_fits_is_what_needs_least() -> None:
    found = solved([DENSE, FEWER], Profile((device(memory_bytes=1e6),)))
    few = worth_a_look(found)
    assert [it.model for it in few] == [DENSE, DENSE, FEWER]
    assert [it.asked for it in few] == [True, False, False]
    assert min(it.least_bytes for it in found.candidates) == few[-1].least_bytes


def _kind(name: str) -> str:
    return name.split()[0].rstrip(",")


@pytest.mark.parametrize("share", [0.35, 0.5])
def test_what_would_meet_a_target_is_what_would_be_chosen_then(share: float) -> None:
    """With a device, which reads prompts quickly: so more memory, and another plan, may cost tokens."""
    there = Accelerator("gpu", 0.3 * DENSE.weights_bytes, 100e9, 50e12, 5e9, step_s=0.0, layer_s=0.0)
    machine = device(
        memory_bytes=share * DENSE.weights_bytes, overheads=FREE, flops=2e11, accelerators=(there,)
    )
    profile, job = Profile((machine,)), Job(2000, 64)
    now, fewer = (solved([it], profile, job).chosen for it in (DENSE, FEWER))
    assert now is not None
    assert fewer is not None
    assert "gpu" in fewer.name
    bits, *_ = changed([DENSE, FEWER], profile, fewer.prediction.tokens_per_s, job)
    assert bits == ("weights in 4 bits", fewer.prediction.tokens_per_s)
    for times in (1.2, 2, 4):
        target = times * now.prediction.tokens_per_s
        ways = changed([DENSE], profile, target, job, Choices(ranks=1))
        assert all(meets(it.tokens_per_s, target) for it in ways), ways


def test_a_target_is_met_by_the_figures_that_are_shown() -> None:
    assert meets(0.04996, 0.05)
    assert meets(99.96, 100)
    assert meets(0.05004, 0.05004)
    assert not meets(0.04994, 0.05)
    assert not meets(0.05004, 0.0501)
