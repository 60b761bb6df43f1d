"""Batches and guesses of a group: by the laws of one machine, never quicker than all ranks together could be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from fakes.throughput.throughput_cases import DENSE, MB, MIXED, device, spec, wanted, weighed
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.group_choice import Choice, NoGroup
from shoal.partition.group_cost import Cost, Placement, _crowd
from shoal.partition.machines import LinkSpeed, Machine, Workload
from shoal.partition.memory_layout import kv_page_bytes
from shoal.partition.plan import Plan, plan_in_ram
from shoal.partition.rank_sizes import Held, Portion, Sizes
from shoal.partition.spec import MoeSpec
from shoal.partition.sum_cost import Means, Network
from shoal.partition.throughput.cost import cost
from shoal.partition.throughput.explain import reason
from shoal.partition.throughput.group_plans import Groups
from shoal.partition.throughput.laws import distinct_experts
from shoal.partition.throughput.prediction import Job, Prediction
from shoal.partition.throughput.profile import (
    ANY,
    AttentionLaw,
    CacheLaw,
    Device,
    Overheads,
    Profile,
    ProfileLink,
    RowsLaw,
    SweptLaw,
)
from shoal.partition.throughput.solve import Choices, Solved, asks, solve
from shoal.partition.throughput.weights_of import Weighed

WINDOWED = weighed(spec(window=128, qk_norm="full"))
LARGE = weighed(spec(32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256), 0.5625)
MODELS = {"dense": DENSE, "mixed": MIXED, "windowed": WINDOWED}
TABLES = tuple(
    RowsLaw("BF16", nbytes, (1, 4, 16, 256), tuple(times * 5e-11 * it for it in (1, 2, 5, 60)))
    for nbytes, times in ((1e5, 2.0), (1e6, 1.2), (1e7, 1.0))
)
SEEN = AttentionLaw("f16", (64, 2048), (4e-11, 2e-11), (2e-11, 1e-11))
CALLS = Overheads(
    swept=SweptLaw((1e-3, 1e-1), (1e-4, 2e-3)),
    stream_s=1e-4,
    stream_layer_s=1e-5,
    expert_s=1e-4,
    hidden_s=1e-9,
    logit_s=1e-9,
)
MEASURED = device(products=TABLES, attention=(SEEN,), overheads=CALLS)
NEAR = tuple(replace(law, byte_s=tuple(it / 2 for it in law.byte_s)) for law in TABLES)
CACHED = replace(MEASURED, caches=CacheLaw((10 * MB, 1000 * MB), (0.0, 1.0), NEAR))
MACHINES = {
    "written": device(),
    "tables": MEASURED,
    "cached": CACHED,
    "small": replace(MEASURED, memory_bytes=0.3 * DENSE.weights_bytes + 100 * MB),
}
NO_CALLS = Overheads(0.0, 0.0, 0.0, 0.0)
FREE = ProfileLink((ANY, ANY), 0.0, 1e14)
NEAR_BY = ProfileLink((ANY, ANY), 5e-5, 1e9)

# (token_s, ttft_s) of one stream without guesses, before groups were predicted with more of them.
ONE_STREAM: Mapping[tuple[str, str, int, int], tuple[float, float]] = {
    ("dense", "written", 2, 70): (0.009114813003174602, 0.0479731424),
    ("dense", "written", 2, 512): (0.009205334603174603, 0.35012733312),
    ("dense", "written", 4, 70): (0.007573814501587302, 0.0354295264),
    ("dense", "written", 4, 512): (0.007619075301587302, 0.22778156416),
    ("dense", "tables", 2, 70): (0.010811683029396566, 0.12016889897685801),
    ("dense", "tables", 2, 512): (0.010902204629396567, 0.8156653569366243),
    ("dense", "tables", 4, 70): (0.008704671699105179, 0.0772164631691028),
    ("dense", "tables", 4, 512): (0.00874993249910518, 0.49940186584112556),
    ("dense", "cached", 2, 70): (0.009071777910857363, 0.09558823385819298),
    ("dense", "cached", 2, 512): (0.009141927198405403, 0.6474927946677309),
    ("dense", "cached", 4, 70): (0.007465603295305477, 0.05946613287090999),
    ("dense", "cached", 4, 512): (0.007497271724472559, 0.3780044071560654),
    ("dense", "small", 2, 70): (0.10532735038244694, 0.18362569192291273),
    ("dense", "small", 2, 512): (0.10533124287060003, 0.8460079537949896),
    ("dense", "small", 4, 70): (0.00878790045290288, 0.07828377363991304),
    ("dense", "small", 4, 512): (0.00883316125290288, 0.505643960841771),
    ("mixed", "written", 2, 70): (0.008224445003174603, 0.0340083424),
    ("mixed", "written", 2, 512): (0.008314966603174604, 0.24113625471999997),
    ("mixed", "written", 4, 70): (0.007941737701587303, 0.029329046400000006),
    ("mixed", "written", 4, 512): (0.007986998501587303, 0.17547650431999998),
    ("mixed", "tables", 2, 70): (0.010322980970621367, 0.11517829519949384),
    ("mixed", "tables", 2, 512): (0.010893061353303571, 0.6191998684169387),
    ("mixed", "tables", 4, 70): (0.00944214442750959, 0.08014689646599651),
    ("mixed", "tables", 4, 512): (0.010478665289596298, 0.390750621974188),
    ("mixed", "cached", 2, 70): (0.009846872709155569, 0.10594694602692421),
    ("mixed", "cached", 2, 512): (0.009929055597560368, 0.6336226425509728),
    ("mixed", "cached", 4, 70): (0.008942519370799778, 0.07034221854535208),
    ("mixed", "cached", 4, 512): (0.00898020460039524, 0.4036007627779587),
    ("windowed", "written", 2, 70): (0.009834889003174602, 0.048698462399999996),
    ("windowed", "written", 2, 512): (0.009882914603174604, 0.34623755648),
    ("windowed", "written", 4, 70): (0.008934029701587303, 0.0381572464),
    ("windowed", "written", 4, 512): (0.008958042501587302, 0.23059220864000002),
    ("windowed", "tables", 2, 70): (0.01153814660713473, 0.12134134941852963),
    ("windowed", "tables", 2, 512): (0.01158617220713473, 0.8191158324546944),
    ("windowed", "tables", 4, 70): (0.010071274476843346, 0.08048004405244603),
    ("windowed", "tables", 4, 512): (0.010095287276843347, 0.508166856103072),
    ("windowed", "cached", 2, 70): (0.00979824148859553, 0.0967606842998646),
    ("windowed", "cached", 2, 512): (0.009835458701106874, 0.6509432701858011),
    ("windowed", "cached", 4, 70): (0.008832206073043644, 0.06272971375425324),
    ("windowed", "cached", 4, 512): (0.008849007536029348, 0.386769397418012),
}


def groups_of(model: Weighed, machine: Device, ranks: int, job: Job, link: ProfileLink = NEAR_BY) -> Groups:
    machines = tuple(replace(machine, name=str(rank)) for rank in range(ranks))
    tokens = job.batch * -(-job.context_tokens // 64) * 64
    asking = wanted(model.spec, kv_tokens=tokens, sequences=job.batch, guesses=job.batch * job.guesses)
    return Groups(model, asking, Profile(machines, (link,)), job, ("f32",))


def predicted(
    model: Weighed, machine: Device, ranks: int, job: Job, link: ProfileLink = NEAR_BY
) -> tuple[Choice, Prediction]:
    groups = groups_of(model, machine, ranks, job, link)
    found = groups.of(ranks)
    assert isinstance(found, Choice)
    return found, groups.cost(found)


def alone(model: Weighed, machine: Device, job: Job) -> Prediction:
    plan = plan_in_ram(wanted(model.spec), model.block_bytes, memory_bytes=10**12)
    assert isinstance(plan, Plan)
    return cost(model, plan, machine, job)


@pytest.mark.parametrize("case", ONE_STREAM, ids=str)
def test_one_stream_takes_what_it_took_before_there_were_others(case: tuple[str, str, int, int]) -> None:
    model, machine, ranks, tokens = case
    machines = tuple(replace(MACHINES[machine], name=str(rank)) for rank in range(ranks))
    profile, job = Profile(machines, (NEAR_BY,)), Job(tokens, 64)
    groups = Groups(MODELS[model], wanted(MODELS[model].spec), profile, job, ("f32",))
    choice = groups.of(ranks)
    assert isinstance(choice, Choice)
    found = groups.cost(choice)
    assert (found.token_s, found.ttft_s) == pytest.approx(ONE_STREAM[case], rel=1e-9)


def test_a_batch_that_computes_is_no_quicker_than_all_ranks_compute() -> None:
    """64 streams of an 8B on machines of 2e11 operations a second."""
    job = Job(128, 64, batch=64)
    one = alone(LARGE, device(memory_bytes=64e9), job)
    _, two = predicted(LARGE, device(memory_bytes=64e9), 2, job)
    assert one.binding == two.binding == "compute"
    assert 1.7 * one.tokens_per_s < two.tokens_per_s < 2 * one.tokens_per_s
    low, high = two.band
    assert low < 2 * one.tokens_per_s < 1.3 * high


streams, ahead = st.integers(1, 100), st.integers(0, 4)
models = st.sampled_from([DENSE, MIXED, WINDOWED])
machines = st.sampled_from([device(), MEASURED, device(overheads=NO_CALLS)])
sizes = st.sampled_from([2, 4])


@settings(max_examples=25, deadline=None)
@given(models, machines, sizes, streams, ahead)
def test_n_machines_are_at_most_n_times_as_quick_as_one(
    model: Weighed, machine: Device, ranks: int, batch: int, guesses: int
) -> None:
    job = Job(64, 32, batch, guesses, 0.6, distinct=1.0)
    (_, one), (_, several) = (predicted(model, machine, it, job, FREE) for it in (1, ranks))
    assert several.tokens_per_s <= (1 + 1e-9) * ranks * one.tokens_per_s
    assert several.tokens_per_s <= 1.02 * ranks * alone(model, machine, job).tokens_per_s
    assert several.ttft_s >= (1 - 1e-9) * one.ttft_s / ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_n_machines_tend_to_be_n_times_as_quick(ranks: int) -> None:
    """The more there is to compute, the less is left of what no machine shares."""
    machine, found = device(overheads=NO_CALLS, memory_bytes=64e9), []
    model = weighed(replace(LARGE.spec, vocab=4096), 0.5625)  # whose head takes next to nothing
    for batch in (1, 16, 64):
        job = Job(64, 32, batch)
        _, several = predicted(model, machine, ranks, job, FREE)
        found.append(several.tokens_per_s / alone(model, machine, job).tokens_per_s)
    assert found == sorted(found)
    assert 0.95 * ranks < found[-1] <= ranks


@settings(max_examples=25, deadline=None)
@given(models, machines, sizes, streams, st.integers(1, 30), ahead, st.sampled_from([FREE, NEAR_BY]))
def test_more_streams_never_take_less_time_a_step(
    model: Weighed, machine: Device, ranks: int, batch: int, more: int, guesses: int, link: ProfileLink
) -> None:
    """Unless these are so many that a step is computed in halves, whose sums travel meanwhile."""
    jobs = [Job(64, 32, it, guesses, 0.6) for it in (batch, batch + more)]
    (few, less), (many, longer) = (predicted(model, machine, ranks, job, link) for job in jobs)
    if few.shares == many.shares and few.experts == many.experts:
        halves = many.figures.overlap_rows <= (batch + more) * (1 + guesses)
        if not halves or few.figures.overlap_rows <= batch * (1 + guesses):
            assert longer.token_s >= (1 - 1e-9) * less.token_s
    assert longer.ttft_s >= (1 - 1e-9) * less.ttft_s


@settings(max_examples=25, deadline=None)
@given(models, machines, sizes, streams, ahead)
def test_no_batch_exceeds_what_memory_and_processors_of_all_ranks_bound(
    model: Weighed, machine: Device, ranks: int, batch: int, guesses: int
) -> None:
    job = Job(64, 32, batch, guesses, 0.6)
    _, found = predicted(model, machine, ranks, job, FREE)
    rows, moe = batch * (1 + guesses), model.spec.moe
    used = distinct_experts(moe.experts, moe.active, rows) if moe else 0.0
    nbytes = operations = 0.0
    for kind, layers in model.layer_kinds.items():
        dense = (*kind.attention, *kind.dense)
        nbytes += layers * (sum(it.nbytes for it in dense) + used * sum(it.nbytes for it in kind.expert))
        active = moe.active if moe else 0
        each = sum(it.rows * it.cols for it in dense) + active * sum(it.rows * it.cols for it in kind.expert)
        operations += 2.0 * layers * rows * each
    step_s = found.token_s * job.step_tokens
    assert step_s >= nbytes / (ranks * machine.memory_bytes_per_s)
    if not machine.products:
        assert step_s >= operations / (ranks * machine.flops)
    assert found.tokens_per_s == pytest.approx(batch / found.token_s)


@settings(max_examples=25, deadline=None)
@given(models, st.sampled_from([*MACHINES.values()]), sizes, streams, ahead)
def test_parts_add_up_to_a_step_and_to_the_prompts(
    model: Weighed, machine: Device, ranks: int, batch: int, guesses: int
) -> None:
    job = Job(64, 32, batch, guesses, 0.6)
    groups = groups_of(model, machine, ranks, job)
    choice = groups.of(ranks)
    if isinstance(choice, NoGroup):
        return
    found = groups.cost(choice)
    assert sum(found.parts.values()) == pytest.approx(found.token_s * job.step_tokens)
    assert sum(found.prompt_parts.values()) == pytest.approx(found.ttft_s)
    assert min(*found.parts.values(), *found.prompt_parts.values()) >= 0


def test_parts_are_what_takes_the_time() -> None:
    job = Job(512, 32)
    _, one = predicted(LARGE, device(memory_bytes=64e9), 2, job)
    assert one.parts["memory"] > 0.8 * one.token_s
    assert one.prompt_parts["compute"] > 0.8 * one.ttft_s
    _, slow = predicted(LARGE, device(memory_bytes=64e9), 2, job, ProfileLink((ANY, ANY), 5e-2, 1e7))
    assert slow.binding == "network"
    assert slow.prompt_parts["network"] > slow.prompt_parts["compute"]


@pytest.mark.parametrize("machine", [device(), MEASURED, CACHED], ids=["as written", "tables", "caches"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "job", [Job(100, 64, 8, distinct=1.0), Job(600, 64, 16, 3, 0.7, distinct=1.0)], ids=str
)
def test_a_batch_on_one_rank_takes_what_it_takes_alone(model: Weighed, machine: Device, job: Job) -> None:
    by_itself, (_, found) = alone(model, machine, job), predicted(model, machine, 1, job)
    assert found.token_s == pytest.approx(by_itself.token_s, rel=0.02)
    assert found.ttft_s == pytest.approx(by_itself.ttft_s, rel=0.05)
    for part in ("memory", "compute", "overhead"):
        assert found.parts[part] == pytest.approx(by_itself.parts[part], rel=0.15), part


def test_guesses_that_come_true_make_groups_quicker_and_others_slower() -> None:
    speeds = [
        predicted(LARGE, device(memory_bytes=64e9), 2, Job(64, 32, 1, 4, chance))[1].tokens_per_s
        for chance in (0.0, 0.5, 0.95)
    ]
    _, plain = predicted(LARGE, device(memory_bytes=64e9), 2, Job(64, 32))
    assert speeds[0] < plain.tokens_per_s < speeds[2]
    assert speeds == sorted(speeds)


def test_a_batch_s_step_sends_what_its_rows_are() -> None:
    """By a link that nothing hides, 16 times as many bytes."""
    slow = ProfileLink((ANY, ANY), 0.0, 1e7)
    one, many = (predicted(DENSE, device(), 2, Job(64, 32, batch), slow)[0] for batch in (1, 16))
    assert many.figures.overlap_rows > 16
    assert many.figures.step.network_s == pytest.approx(16 * one.figures.step.network_s, rel=0.1)


def test_the_band_of_a_mixture_s_batch_has_both_ends_of_what_tokens_wake() -> None:
    job = Job(64, 32, 8)
    _, unsure = predicted(MIXED, device(), 2, job)
    for share in (0.61, 1.0):
        _, sure = predicted(MIXED, device(), 2, job._replace(distinct=share))
        assert unsure.band[0] <= sure.band[0] * 1.01
        assert unsure.band[1] >= sure.band[1] * 0.99
    assert unsure.band[1] / unsure.band[0] > 1.1 * sure.band[1] / sure.band[0]


def test_prompts_of_a_batch_are_read_together_while_the_head_decodes() -> None:
    """Where links are far, until so many streams decode that they are worth a group as well."""
    far = ProfileLink((ANY, ANY), 1e-2, 125e6)
    machines = Profile(tuple(device(name=name, flops=2e10) for name in "ab"), (far,))
    model, chosen = weighed(spec(16, hidden=2048, ffn=5632, heads=32)), []
    for batch in (4, 16):
        job = Job(256, 64, batch)
        found = solve([model], asks(job, None, 256, 1, 0), machines, job)
        assert found.chosen is not None
        chosen.append(found.chosen.name)
        named = {it.name: it.prediction for it in found.candidates}
        if batch == 4:
            both, alone_ = named["prompts by 2"], named["memory"]
            assert both.token_s == pytest.approx(alone_.token_s, rel=0.02)
            assert both.ttft_s < 0.6 * alone_.ttft_s
    assert chosen == ["prompts by 2", "group of 2"]


def test_steps_of_answers_with_as_many_rows_as_prompts_are_for_the_group() -> None:
    """By `Plan.worth_a_group`; pages that pass count for every stream's prompt."""
    machines = [Machine(name, 10**11, 20e9, 2e10) for name in "ab"]
    network = Network(machines, {(0, 1): LinkSpeed(1e-2, 125e6)}, (0, 1))
    alone_, parts = (
        [Placement(it, Portion.even(DENSE.spec, share, not rank), Held(0, 0, 0.0, 256)) for rank, it in each]
        for share, each in ((1.0, [(0, machines[0])]), (0.5, enumerate(machines)))
    )
    means = [Means("star", "f32")]
    for streams in (2, 200):
        sizes = Sizes.of(DENSE.spec, DENSE.block_bytes)
        predicts = Cost(wanted(DENSE.spec), sizes, Workload(256, 64, streams))
        answers, together = (
            predicts.tensor(each, network, how) for each, how in ((alone_, ()), (parts, means))
        )
        found = predicts.assisted(alone_, answers, parts, network, means)
        assert found is not None
        assert 2 < found.group_rows <= 200
        assert found.token_s == (answers if streams == 2 else together).token_s
        assert found.first_token_s[0] > together.first_token_s[0]
        assert found.prompts.seconds == pytest.approx(found.first_token_s[0])


def test_machines_of_two_speeds_have_batches_too() -> None:
    """What reads does so once for all streams, but for their K and V; what computes goes with rows."""
    wide = wanted(LARGE.spec, context_tokens=1024)
    machine, sizes = Machine("one", 10**11, 20e9, 2e11), Sizes.of(LARGE.spec, LARGE.block_bytes)
    place = Placement(machine, Portion.even(LARGE.spec, 1.0), Held(0, 0, 0.0, 256))
    network = Network([machine], {}, (0,))
    took = [
        Cost(wide, sizes, Workload(128, 64, streams, 0)).tensor([place], network, ()).step
        for streams in (1, 64)
    ]
    assert took[0].memory_s > 0.9 * took[0].seconds
    blocks = (block for block in LARGE.spec.blocks() if block.kind != "embed")
    weights = sum(it.rows * it.cols for block in blocks for it in LARGE.products[block])
    assert took[1].seconds > 2 * 64 * weights / 2e11
    assert took[1].compute_s > 0.8 * took[1].seconds


def test_the_busiest_rank_never_has_fewer_of_more_experts() -> None:
    """Two whole experts of eight are on one of four ranks by chance; all eight are two on each."""
    most = [used / 8 * _crowd(8, used / 8, 4) / 4 for used in range(16, 65)]
    assert most == pytest.approx(sorted(most))
    assert most[0] == pytest.approx(1 + 1 / 7)
    assert most[-1] == pytest.approx(2)
    assert 1 < _crowd(512, 200.5, 2) < 1.1


def solved(model: Weighed, memory_bytes: float, job: Job, choices: Choices = Choices()) -> Solved:  # noqa: B008
    machine = device(memory_bytes=memory_bytes, disk_bytes_per_s=0.0)
    machines = Profile(tuple(replace(machine, name=name) for name in "ab"), (NEAR_BY,))
    return solve([model], asks(job, None, 256, 1, 0), machines, job, choices)


def test_ranks_have_room_for_k_and_v_of_all_streams_or_are_no_group() -> None:
    few, many = Job(256, 64, 1), Job(256, 64, 200)
    kv_bytes = (many.batch - few.batch) * 5 * kv_page_bytes(DENSE.spec, "f16")
    memory_bytes = 0.7 * DENSE.weights_bytes + 150 * MB
    named = {it.name: it for it in solved(DENSE, memory_bytes, few).candidates}
    assert named["group of 2"].fits
    assert "group of 2" not in {it.name for it in solved(DENSE, memory_bytes, many).candidates}
    roomy = {it.name: it for it in solved(DENSE, memory_bytes + kv_bytes, many).candidates}
    insisted = solved(DENSE, memory_bytes, many, Choices(ranks=2))
    assert "of memory, there are" in reason(insisted)
    grown = [
        roomy["group of 2"].prediction.peak_bytes[name] - named["group of 2"].prediction.peak_bytes[name]
        for name in "ab"
    ]
    assert kv_bytes <= sum(grown)
    assert max(roomy["group of 2"].prediction.peak_bytes.values()) <= memory_bytes + kv_bytes


@pytest.mark.parametrize("experts", [3, 6, 7, 10, 160])
def test_a_mixture_with_one_active_expert_has_groups(experts: int) -> None:
    """One of six is used by a token, as far as numbers can be divided."""
    model = weighed(spec(moe=MoeSpec(experts, 1, 512, True), ffn=0))
    assert _crowd(experts, distinct_experts(experts, 1, 1), 2) == pytest.approx(2.0)
    profile = Profile((device(), replace(device(), name="two")), (ProfileLink((ANY, ANY), 1e-5, 1e10),))
    found = solve([model], asks(Job(64, 16), None, 256, 1, 0), profile, Job(64, 16), Choices(ranks=2))
    assert found.chosen is not None


def test_what_was_measured_of_a_group_counts_in_its_steps() -> None:
    profile = Profile((device(), replace(device(), name="two")), (ProfileLink((ANY, ANY), 1e-5, 1e10),))
    groups = Groups(DENSE, wanted(DENSE.spec), profile, Job(64, 16), ("f32",))
    found = groups.of(2)
    assert isinstance(found, Choice)
    slow = found._replace(figures=found.figures.slower(3.0, 16))
    now, then = groups.cost(found), groups.cost(slow)
    assert then.token_s == pytest.approx(slow.figures.token_s, rel=0.1)
    assert 2.5 * now.token_s < then.token_s < 3.01 * now.token_s
    assert sum(then.parts.values()) == pytest.approx(then.token_s)
