"""Plans with a device beside those without: predicted as can be worked out by hand, and never chosen where they are
predicted to be slower."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from fakes.throughput.throughput_cases import DENSE, FREE, MB, MIXED, device, free_card, spec, wanted, weighed
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.placement import DeviceRoom, NoRoomThere
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId, MoeSpec
from shoal.partition.throughput.alone import AS_QUICK, best_plan, usual_job
from shoal.partition.throughput.cost import Took, cost, step_cost
from shoal.partition.throughput.placing.device_choice import plan_with_device, with_device_or_alone
from shoal.partition.throughput.placing.device_ways import coming_one, ways_through_device, ways_with_device
from shoal.partition.throughput.placing.rooms import room_of
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.profile import Accelerator, Corrections, Device, Overheads
from shoal.partition.throughput.weights_of import Weighed

MEMORY = 1 << 34
MACHINE = replace(device(), overheads=FREE, measured=True)
card = partial(free_card, host_bytes_per_s=1e14)  # and a link that takes no time


def room(there: Accelerator, model: Weighed) -> DeviceRoom:
    return room_of(there, coming_one(model))._replace(kernel_bytes=0, gathers=False)


def planned(model: Weighed, there: Accelerator, machine: Device = MACHINE) -> Plan:
    made = plan_with_device(model, [wanted(model.spec)], room(there, model), MEMORY, machine)
    assert isinstance(made, Plan), made
    return made


def token_s(model: Weighed, plan: Plan, there: Accelerator, machine: Device = MACHINE) -> float:
    return cost(model, plan, replace(machine, accelerators=(there,)), Job(512, 64)).token_s


@pytest.mark.parametrize("model", [DENSE, MIXED], ids=["dense", "mixture"])
def test_a_device_like_the_processor_takes_as_long(model: Weighed) -> None:
    """Wherever the blocks are."""
    alone = best_plan(model, [wanted(model.spec)], MEMORY, MACHINE)
    assert isinstance(alone, Plan)
    job = Job(512, 64, fresh=0.0)
    expected = cost(model, alone, MACHINE, job)
    twin = {"memory_bytes_per_s": MACHINE.memory_bytes_per_s, "flops": MACHINE.flops}
    for memory in (8e9, model.weights_bytes / 2):
        there = card(memory_bytes=memory, **twin)
        plan = replace(planned(model, there), staged_tokens=0, staged_experts=0)
        assert plan.device_whole == (memory == 8e9)
        found = cost(model, plan, replace(MACHINE, accelerators=(there,)), job)
        if plan.device_whole or model is DENSE:
            assert found.token_s == pytest.approx(expected.token_s, rel=1e-6)
            assert found.ttft_s == pytest.approx(expected.ttft_s, rel=1e-3)
        else:  # experts in both places compute beside each other
            assert expected.token_s / 2 < found.token_s < 1.000001 * expected.token_s


@pytest.mark.parametrize("model", [DENSE, MIXED], ids=["dense", "mixture"])
@pytest.mark.parametrize("passing", [False, True], ids=["staying", "passing"])
def test_what_running_taught_of_the_processor_counts_in_every_plan(model: Weighed, passing: bool) -> None:
    """One that turned out to take twice as long for everything does so for its part of a plan with a device."""
    overheads = Overheads(1e-3, 1e-4, 1e-4, 1e-9)
    machine = replace(MACHINE, overheads=overheads)
    learnt = replace(machine, corrections=Corrections(memory=2.0, compute=2.0, overhead=2.0))
    there = card(memory_bytes=model.weights_bytes / 2)
    made = planned(model, there)
    if passing:
        (way,) = ways_through_device(model, [wanted(model.spec)], room(there, model), MEMORY)
        assert isinstance(way.made, Plan)
        made = way.made
    plan = replace(made, staged_tokens=0, staged_experts=0)

    def taken(host: Device) -> Took:
        return step_cost(model, plan, replace(host, accelerators=(there,)), 1, 400)

    slowed = replace(machine.slowed(2.0, 2.0), overheads=Overheads(2e-3, 2e-4, 2e-4, 2e-9))
    assert taken(learnt).seconds == pytest.approx(taken(slowed).seconds, rel=1e-9)
    assert taken(learnt).seconds > taken(machine).seconds


def test_a_layer_on_the_device_takes_its_bytes_at_its_speed() -> None:
    there = card()
    plan = planned(DENSE, there)
    assert plan.device_whole
    kv = 8 * 2 * 4 * 64 * 2 * 545
    weights = DENSE.weights_bytes - 2 * 4096 * 1024
    assert token_s(DENSE, plan, there) == pytest.approx((weights + kv) / 1000e9, rel=0.01)


def test_hidden_states_and_logits_pass_the_link() -> None:
    """In once, and back at the end: of 1,024 and 4,096 numbers in f32."""
    quick, slow = card(), card(host_bytes_per_s=1e6, copy_s=1e-3)
    plan = planned(DENSE, quick)
    more = token_s(DENSE, plan, slow) - token_s(DENSE, plan, quick)
    assert more == pytest.approx(2e-3 + 4 * (1024 + 4096) / 1e6, rel=1e-6)


def test_experts_of_the_processor_cost_two_copies_a_layer() -> None:
    dense = MIXED.weights_bytes - sum(
        MIXED.block_bytes[it] for it in MIXED.block_bytes if it.kind == "expert"
    )
    quick = card(memory_bytes=dense + 40e6)
    plan = replace(planned(MIXED, quick), staged_tokens=0, staged_experts=0)
    assert (plan.device_layers[0], plan.device_experts[0]) == (8, 0)
    slow = replace(quick, copy_s=1e-3)
    assert token_s(MIXED, plan, slow) - token_s(MIXED, plan, quick) == pytest.approx(
        (2 * 8 + 2) * 1e-3, rel=1e-6
    )


def test_layers_come_while_the_processor_attends() -> None:
    """A step takes the longer of all that comes and of all else."""
    there = card(memory_bytes=DENSE.weights_bytes / 2)
    plan, rows = planned(DENSE, there), 256
    theirs = 8 - plan.device_layers[0]
    assert plan.staged_tokens
    assert theirs > 4

    def first_s(**changes: float) -> float:
        machine = replace(MACHINE, accelerators=(replace(there, **changes),))
        return cost(DENSE, plan, machine, Job(rows, 1)).ttft_s

    slow, slower = 1e6, 0.5e6
    nbytes = sum(DENSE.block_bytes[BlockId(kind, 0)] for kind in ("attn", "ffn"))
    more = first_s(host_bytes_per_s=slower) - first_s(host_bytes_per_s=slow)
    assert more == pytest.approx(theirs * nbytes * (1 / slower - 1 / slow), rel=1e-3)
    attended = first_s(host_bytes_per_s=1e15) / (theirs * nbytes)  # seconds a byte
    assert first_s(host_bytes_per_s=10 / attended) < 1.5 * first_s(host_bytes_per_s=1e15)
    assert first_s(copy_s=1.0) - first_s() == pytest.approx(2 * theirs + 2), (
        "both ways in each layer, in and back"
    )


def test_which_way_is_best() -> None:
    dense = MIXED.weights_bytes - sum(
        MIXED.block_bytes[it] for it in MIXED.block_bytes if it.kind == "expert"
    )
    for model, there, said in (
        (DENSE, card(), "on gpu: all layers: "),
        (DENSE, card(memory_bytes=DENSE.weights_bytes / 2, host_bytes_per_s=1e8), "on gpu: 3 of 8 layers: "),
        (
            DENSE,
            card(memory_bytes=DENSE.weights_bytes / 2),
            "on gpu: 1 of 8 layers, others come ",
        ),
        (MIXED, card(), "on gpu: all layers: "),
        (MIXED, card(memory_bytes=dense + 40e6, host_bytes_per_s=1e9), "on gpu: all but experts: "),
        (
            MIXED,
            card(memory_bytes=dense + 100e6, host_bytes_per_s=100e9),
            "on gpu: all but experts, experts come ",
        ),
        (DENSE, card(memory_bytes_per_s=1e9, flops=1e10), "the processor alone: "),
        (DENSE, card(layer_s=0.1), "the processor alone: "),
        (MIXED, card(memory_bytes=dense + 40e6, copy_s=0.05), "the processor alone: "),
        (DENSE, card(memory_bytes=1e6), "the processor alone: gpu has no room for a layer"),
    ):
        found = with_device_or_alone(model, [wanted(model.spec)], room(there, model), MEMORY, MACHINE)
        assert isinstance(found, Plan)
        assert found.why.startswith(said), (said, found.why)
        assert bool(found.device) == said.startswith("on gpu")


def test_for_many_requests_weights_may_pass() -> None:
    """Where the device has room for next to nothing, and for nothing with the scratch of such steps."""
    dense = MIXED.weights_bytes - sum(
        MIXED.block_bytes[it] for it in MIXED.block_bytes if it.kind == "expert"
    )
    contexts = [wanted(MIXED.spec, sequences=256, chunk_tokens=1024, kv_tokens=256 * 1024)]
    for link, many, said in (
        (20e9, True, "through gpu, where prompts attend: "),
        (1e8, True, "the processor alone: "),
        (20e9, False, "the processor alone: "),
    ):
        there = card(memory_bytes=dense + 300e6, host_bytes_per_s=link)
        found = with_device_or_alone(MIXED, contexts, room(there, MIXED), MEMORY, MACHINE, many=many)
        assert isinstance(found, Plan)
        assert found.why.startswith(said), found.why
        assert found.passes == said.startswith("through")
        if many:
            assert "prompts of 512 tokens (some of 896) and answers of 128, many together, are" in found.why


def test_experts_come_to_a_device_that_is_named_however_little_that_gains() -> None:
    """To one that `auto` takes only where it gains enough for the usual job, or for many."""
    there, contexts = card(memory_bytes=200e6, host_bytes_per_s=8e9), [wanted(MIXED.spec, sequences=64)]
    found = with_device_or_alone(MIXED, contexts, room(there, MIXED), MEMORY, MACHINE, many=True)
    named = plan_with_device(MIXED, contexts, room(there, MIXED), MEMORY, MACHINE, many=True)
    assert isinstance(found, Plan)
    assert isinstance(named, Plan)
    assert found.device == named.device == "gpu"
    assert (found.staged_experts > 0, named.staged_experts > 0) == (False, True)
    assert not named.why, "nobody has chosen"


@pytest.mark.parametrize(("link", "come"), [(1e14, True), (12e9, False)])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_layers_come_to_a_device_that_is_named_unless_answers_lose_more_than_prompts_gain(
    link: float, come: bool, share: float
) -> None:
    """The last ones make room for two of them, and answers have these computed by the processor."""
    there = card(memory_bytes=share * DENSE.weights_bytes, host_bytes_per_s=link)
    contexts, its = [wanted(DENSE.spec)], room(there, DENSE)
    job, here = usual_job(contexts[0].context_tokens), replace(MACHINE, accelerators=(there,))
    made = planned(DENSE, there)
    ways = [way.made for way in ways_with_device(DENSE, contexts, its, MEMORY, MACHINE)]
    took = [cost(DENSE, it, here, job).total_s(job) for it in ways if isinstance(it, Plan)]
    assert {it.staged_tokens > 0 for it in ways if isinstance(it, Plan)} == {False, True}
    assert cost(DENSE, made, here, job).total_s(job) <= AS_QUICK * min(took)
    assert (made.staged_tokens > 0) == come


def test_where_the_processors_memory_is_too_small_the_device_helps() -> None:
    there, few = card(memory_bytes=DENSE.weights_bytes), DENSE.weights_bytes // 2 + 60 * MB
    found = with_device_or_alone(
        DENSE, [wanted(DENSE.spec)], room(there, DENSE), few, MACHINE, streaming=False
    )
    assert isinstance(found, Plan)
    assert found.why == "gpu computes with the processor, whose memory alone is too small"
    streamed = with_device_or_alone(DENSE, [wanted(DENSE.spec)], room(there, DENSE), few, MACHINE)
    assert isinstance(streamed, Plan)
    assert streamed.device == "gpu"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([DENSE, MIXED]),
    st.floats(1e6, 1e9),
    st.floats(1e8, 1e13),
    st.floats(1e9, 1e15),
    st.floats(1e6, 1e12),
    st.floats(0, 1e-2),
)
def test_it_is_never_predicted_to_be_slower_than_the_processor_alone(
    model: Weighed, memory: float, speed: float, flops: float, link: float, call_s: float
) -> None:
    there = card(
        memory_bytes=memory,
        memory_bytes_per_s=speed,
        flops=flops,
        host_bytes_per_s=link,
        layer_s=call_s,
        copy_s=call_s,
    )
    contexts = [wanted(model.spec)]
    chosen = with_device_or_alone(model, contexts, room(there, model), MEMORY, MACHINE)
    alone = best_plan(model, contexts, MEMORY, MACHINE)
    assert isinstance(chosen, Plan)
    assert isinstance(alone, Plan)
    here = replace(MACHINE, accelerators=(there,))
    job = usual_job(chosen.context_tokens)
    took, without = (cost(model, plan, here, job).total_s(job) for plan in (chosen, alone))
    assert took <= without
    for way in ways_with_device(model, contexts, room(there, model), MEMORY, MACHINE):
        if isinstance(way.made, Plan):  # nor is one missed that would be worth it
            assert took <= AS_QUICK * cost(model, way.made, here, job).total_s(job)


def test_a_machine_of_which_nobody_has_said_anything_is_taken_for_a_fast_one() -> None:
    """One at 60 GB/s would be worth it beside 20 GB/s, whether those were measured or written down."""
    there, contexts = card(memory_bytes_per_s=60e9, flops=1e12), [wanted(DENSE.spec)]
    for measured, guessed in ((True, False), (False, False), (False, True)):
        machine = replace(MACHINE, measured=measured, guessed=guessed)
        found = with_device_or_alone(DENSE, contexts, room(there, DENSE), MEMORY, machine)
        assert isinstance(found, Plan)
        assert bool(found.device) != guessed


@pytest.mark.parametrize("link", [25e9, 4e9])
def test_experts_come_for_as_many_tokens_of_a_prompt_as_there_is_room_for(link: float) -> None:
    """They take a link as long for 256 tokens as for 2,048, so a long prompt comes in long steps, and the plan for the
    usual one is no slower for it."""
    model = weighed(spec(moe=MoeSpec(128, 8, 2048, True), ffn=0))
    there = card(memory_bytes=model.weights_bytes / 2, host_bytes_per_s=link)
    contexts, its = [wanted(model.spec, context_tokens=4096)], room(there, model)
    here = replace(MACHINE, accelerators=(there,))
    made = [way.made for way in ways_with_device(model, contexts, its, MEMORY, MACHINE)]
    plans = [it for it in made if isinstance(it, Plan)]
    assert len(plans) == len(made) >= 2
    long, *short = sorted(plans, key=lambda it: -it.chunk_tokens)
    assert long.chunk_tokens == 4096
    assert {it.chunk_tokens for it in short} == {contexts[0].chunk_tokens}
    job = Job(4000, 64)
    firsts = [cost(model, it, here, job).ttft_s for it in short]
    assert 3 * cost(model, long, here, job).ttft_s < min(firsts)
    for chosen in (
        with_device_or_alone(model, contexts, its, MEMORY, MACHINE),
        plan_with_device(model, contexts, its, MEMORY, MACHINE),
    ):
        assert isinstance(chosen, Plan)
        assert chosen.chunk_tokens == 4096


def test_a_device_without_room_is_no_way() -> None:
    there = card(memory_bytes=1e6)
    made = plan_with_device(DENSE, [wanted(DENSE.spec)], room(there, DENSE), MEMORY, MACHINE)
    assert isinstance(made, NoRoomThere)
    assert not [*ways_with_device(DENSE, [wanted(DENSE.spec)], room(there, DENSE), MEMORY, MACHINE)]
