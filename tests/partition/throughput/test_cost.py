"""Predictions as they can be worked out by hand; and what must hold for all: faster hardware is never slower."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes.throughput.throughput_cases import DENSE, FREE, MB, MIXED, device, spec, wanted, weighed
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.plan import Plan, plan_in_ram
from shoal.partition.spec import RopeSpec
from shoal.partition.streamed_plan import plan_streamed
from shoal.partition.throughput.cost import cost
from shoal.partition.throughput.laws import attention, distinct_experts, product
from shoal.partition.throughput.prediction import MEASURED, Binding, Job, Prediction, uncertainty
from shoal.partition.throughput.profile import (
    ANY,
    AttentionLaw,
    CacheLaw,
    Contention,
    Device,
    Overheads,
    Repeats,
    RowsLaw,
)
from shoal.partition.throughput.weights_of import Product, Weighed, attended, kv_bytes_by_layer

ALONE = Contention(1.0, 1.0)


def in_ram(model: Weighed) -> Plan:
    plan = plan_in_ram(wanted(model.spec), model.block_bytes, memory_bytes=10**12)
    assert isinstance(plan, Plan)
    return plan


def streamed(model: Weighed, memory: int) -> Plan:
    plan = plan_streamed(wanted(model.spec), model.extents, model.vectors_bytes, memory_bytes=memory)
    assert isinstance(plan, Plan), plan
    return plan


def predicted(model: Weighed, machine: Device, job: Job = Job(), memory: int = 0) -> Prediction:  # noqa: B008
    plan = streamed(model, memory) if memory else in_ram(model)
    return cost(model, plan, replace(machine, overheads=FREE, contention=ALONE), job)


def test_a_token_takes_as_long_as_its_bytes() -> None:
    """Weights but for the embedding, and K and V of 544 tokens (512 and half of 64), at 20 GB/s."""
    found = predicted(DENSE, device(), Job(512, 64))
    kv = 8 * 2 * 4 * 64 * 2 * 545
    weights = DENSE.weights_bytes - 2 * 4096 * 1024
    assert found.token_s == pytest.approx((weights + kv) / 20e9, rel=0.01)
    assert found.binding == "memory"
    assert found.stall_share == 0
    assert found.band[0] < found.tokens_per_s < found.band[1]


def test_weights_that_caches_keep_are_read_from_there() -> None:
    """All of them, half of them on a logarithmic scale, and none, by the bytes of a step."""
    whole = DENSE.weights_bytes - 2 * 4096 * 1024 + 8 * 2 * 4 * 64 * 2 * 545
    far, near = RowsLaw(ANY, 1.0, (1, 256), (5e-11, 1e-9)), RowsLaw(ANY, 1.0, (1, 256), (2e-11, 9e-10))

    def token_s(*nbytes: int) -> float:
        caches = CacheLaw(nbytes, (0.0, 1.0), (near,))
        return predicted(DENSE, replace(device(), products=(far,), caches=caches), Job(512, 64)).token_s

    bare = predicted(DENSE, replace(device(), products=(far,)), Job(512, 64)).token_s
    few, half, none = token_s(whole, 9 * whole), token_s(whole // 4, 4 * whole), token_s(1, whole)
    assert none == bare
    assert few == pytest.approx(bare * 2 / 5, rel=0.02)
    assert half == pytest.approx((few + bare) / 2, rel=0.02)


def test_further_experts_of_a_layer_cost_each() -> None:
    """Four rows of dice choose 32 × (1 − (28/32)⁴) of 32 experts; one row its four, which `mixture_s` has."""
    own, plan = replace(FREE, expert_s=1e-4), in_ram(MIXED)
    for batch, further in ((1, 0.0), (4, 32 * (1 - (28 / 32) ** 4) - 4)):
        job = Job(64, 64, batch, distinct=1.0)
        plain, costly = (
            cost(MIXED, plan, replace(device(), overheads=it, contention=ALONE), job).token_s
            for it in (FREE, own)
        )
        assert costly - plain == pytest.approx(len(MIXED.spec.layers) * further * 1e-4)


def test_tables_of_caches_that_are_not_like_the_others_say_nothing() -> None:
    far, other = RowsLaw(ANY, 1.0, (1, 256), (5e-11, 1e-9)), RowsLaw(ANY, 1.0, (1,), (1e-11,))
    machine = replace(device(), products=(far,), caches=CacheLaw((10,), (0.5,), (other,)))
    assert machine.going_round(1).products == (far,)
    assert machine.going_round(11) is machine


def test_a_prompt_takes_as_long_as_its_operations() -> None:
    """512 tokens; of the last layer's FFN only what the one wanted row needs, and the head for that row."""
    found = predicted(DENSE, device(), Job(512, 1))
    layer = sum(
        it.rows * it.cols for it in DENSE.layer_kinds and DENSE.kind_of(0).attention + DENSE.kind_of(0).dense
    )
    ffn = sum(it.rows * it.cols for it in DENSE.kind_of(0).dense)
    scores = 4 * 8 * 16 * 64 * 512 * 513 / 2 / 0.5  # attention at half the speed
    floor = (2 * 512 * (8 * layer - ffn) + scores) / 200e9
    assert found.ttft_s == pytest.approx(floor, rel=0.03)
    assert found.binding in ("compute", "memory")


def test_several_streams_share_the_reading_of_weights() -> None:
    one, four = (predicted(DENSE, device(), Job(256, 64, batch)) for batch in (1, 4))
    assert four.token_s < 1.5 * one.token_s
    assert four.tokens_per_s > 2.5 * one.tokens_per_s
    assert four.ttft_s == pytest.approx(4 * one.ttft_s, rel=0.05)


def test_sliding_windows_bound_what_is_read_of_k_and_v() -> None:
    whole, half = spec(), spec(window=128)
    assert attended(whole, 4096) == 8 * 4096
    assert attended(half, 4096) == 4 * 4096 + 4 * 128
    found = [predicted(weighed(it), device(), Job(4096, 2)).token_s for it in (whole, half)]
    assert found[0] - found[1] == pytest.approx(4 * (4096 - 128) * 4 * 2 * 64 * 2 / 20e9, rel=0.05)
    assert kv_bytes_by_layer(half, 4096, "f16") == (4 * 64 + 4 * 3) * 4 * 2 * 64 * 64 * 2
    assert kv_bytes_by_layer(half, 64, "f16") == 8 * 4 * 2 * 64 * 64 * 2


def test_attention_of_a_chunk_within_a_window() -> None:
    one = device(memory_bytes_per_s=1e15)
    long = attention(one, spec(), "f16", 256, 8192, 128).seconds
    assert long == pytest.approx(4 * 256 * 128 * 1024 / 100e9)
    inside = attention(one, spec(), "f16", 64, 0, 128).seconds
    assert inside == attention(one, spec(), "f16", 64, 0, None).seconds


def test_a_row_is_stored_and_turned_whatever_it_sees() -> None:
    """A row of a query's number took 2 ns and 0.1 ns for each token seen, of 100 and 1,000: so it does of others."""
    contexts = (100, 1000)
    each = tuple((2e-9 + 0.1e-9 * seen) / seen for seen in contexts)
    one = device(memory_bytes_per_s=1e15, attention=(AttentionLaw("f16", contexts, each, each),))
    numbers = spec().heads * spec().head_dim
    for seen in (1, 20, 100, 400, 1000):
        found = attention(one, spec(), "f16", 1, seen - 1, None).seconds
        assert found == pytest.approx(numbers * (2e-9 + 0.1e-9 * seen))
    assert attention(one, spec(), "f16", 1, 1999, None).seconds == pytest.approx(numbers * 204e-9)


def test_rows_that_see_little_cost_no_more_than_those_that_were_measured() -> None:
    """Whatever two measurements that disturbed each other say of it."""
    for each in ((1e-9, 4e-9), (4e-9, 1e-11)):
        one = device(memory_bytes_per_s=1e15, attention=(AttentionLaw("f16", (100, 1000), each, each),))
        least, first = (attention(one, spec(), "f16", 1, seen - 1, None).seconds for seen in (10, 100))
        assert 0.099 * first <= least <= first


def test_heads_of_k_and_v_cost_what_is_not_a_query_s() -> None:
    """With a head of K and V for each query's, and for four: what lies between is divided among the queries."""
    laws = tuple(
        AttentionLaw("f16", (100,), (of_one,), (of_one,), queries)
        for queries, of_one in ((1, 5e-9), (4, 2e-9))
    )
    one = device(memory_bytes_per_s=1e15, attention=laws)
    for kv_heads, number_s in ((16, 5e-9), (8, 3e-9), (4, 2e-9), (2, 1.5e-9)):
        found = attention(one, replace(spec(), kv_heads=kv_heads), "f16", 1, 99, None).seconds
        assert found == pytest.approx(16 * 64 * 100 * number_s)


def test_many_queries_of_a_head_of_k_and_v_take_their_share_at_least() -> None:
    """Though one query of each was measured to take more than four times as long as four, or less than they do."""
    for of_one, kv_heads, number_s in (
        (9e-9, 2, 1e-9),
        (9e-9, 1, 0.5e-9),
        (1e-9, 16, 1e-9),
        (1e-11, 16, 1e-11),
    ):
        laws = tuple(
            AttentionLaw("f16", (100,), (each,), (each,), queries)
            for queries, each in ((2, of_one), (4, 2e-9))
        )
        one = device(memory_bytes_per_s=1e15, attention=laws)
        found = attention(one, replace(spec(), kv_heads=kv_heads), "f16", 1, 99, None).seconds
        assert found == pytest.approx(16 * 64 * 100 * number_s)


def test_streaming_takes_as_long_as_the_disk() -> None:
    memory = DENSE.weights_bytes // 2
    plan = streamed(DENSE, memory)
    found = predicted(DENSE, device(), memory=memory)
    assert plan.streamed_bytes > 0
    assert found.binding == "disk"
    reading_s = plan.streamed_bytes / 1e9
    assert reading_s <= found.token_s <= reading_s + 0.05
    assert 0.5 < found.stall_share < 1


def test_contention_slows_what_is_hidden_too() -> None:
    plan = streamed(DENSE, DENSE.weights_bytes // 2)
    calm = replace(device(), contention=ALONE)
    assert cost(DENSE, plan, calm, Job()).token_s < cost(DENSE, plan, device(), Job()).token_s


def test_what_blocks_give_is_added_to_every_number_of_a_hidden_state() -> None:
    """In two halves: of the last layer only the row whose logits are wanted is fed. A norm over whole queries and keys,
    and that of a mixture and the zeros it begins with, pass through as many numbers again."""
    job, own = Job(64, 2), replace(FREE, hidden_s=1e-7)
    hidden, layers = DENSE.spec.hidden, len(DENSE.spec.layers)

    def more(model: Weighed) -> tuple[float, float]:
        plan = in_ram(model)
        plain, costly = (cost(model, plan, replace(device(), overheads=it), job) for it in (FREE, own))
        return (costly.token_s - plain.token_s) / 1e-7, (costly.ttft_s - plain.ttft_s) / 1e-7

    assert more(DENSE) == pytest.approx((layers * hidden, ((layers - 0.5) * 64 + 0.5) * hidden))
    assert more(MIXED)[0] == pytest.approx(2 * layers * hidden)
    normed = replace(DENSE.spec, qk_norm="full")
    asked = (normed.heads + normed.kv_heads) * normed.head_dim
    assert more(replace(DENSE, spec=normed))[0] == pytest.approx(layers * (hidden + asked / 2))


def test_a_weight_of_softmax_is_divided_among_the_dimensions_of_a_head() -> None:
    """With 64 dimensions a number costs 1.5 times as much as with 128: half as much again for the weight of each."""
    narrow, wide = (
        AttentionLaw("f16", (100,), (it,), (it,), 4, dim) for it, dim in ((3e-9, 64), (2e-9, 128))
    )
    machine = device(memory_bytes_per_s=1e15, attention=(narrow, wide))

    def number_s(dim: int) -> float:
        its = replace(DENSE.spec, heads=16, kv_heads=4, head_dim=dim, ropes=(RopeSpec(dim, 1e4),))
        return attention(machine, its, "f16", 1, 999, None).seconds / (1000 * 16 * dim)

    assert [number_s(dim) for dim in (64, 96, 128)] == pytest.approx([3e-9, 1e-9 + 128e-9 / 96, 2e-9])
    assert (number_s(32), number_s(256)) == pytest.approx((3e-9, 2e-9)), "beyond, nothing is made up"


def test_pages_that_nobody_had_are_paid_for() -> None:
    """Two texts of 100 tokens begin two pages each, a third with their 29th later token; all as whole pages. Nobody
    asks for K and V of the last token."""
    plan, machine = in_ram(DENSE), replace(device(), touch_bytes_per_s=1e9)
    page_s = plan.kv.nbytes / plan.kv.pages / 1e9

    def more_s(job: Job) -> tuple[float, float]:
        fresh, used = (cost(DENSE, plan, machine, job._replace(fresh=it)) for it in (1.0, 0.0))
        assert fresh.prompt_parts["overhead"] - used.prompt_parts["overhead"] == pytest.approx(
            fresh.ttft_s - used.ttft_s
        )
        return fresh.ttft_s - used.ttft_s, fresh.token_s - used.token_s

    assert more_s(Job(100, 29, 2)) == pytest.approx((4 * page_s, 0.0))
    assert more_s(Job(100, 30, 2)) == pytest.approx((4 * page_s, 2 * page_s / 29))
    half, none = (cost(DENSE, plan, machine, Job(100, 30, 2, fresh=it)).ttft_s for it in (0.5, 0.0))
    assert half - none == pytest.approx(2 * page_s)


def test_experts_that_several_tokens_wake() -> None:
    assert distinct_experts(64, 8, 1) == pytest.approx(8)
    assert distinct_experts(64, 8, 4, 1.0) == pytest.approx(64 * (1 - (7 / 8) ** 4))
    assert distinct_experts(64, 8, 128) == pytest.approx(64, rel=0.01)
    assert distinct_experts(64, 8, 4) == pytest.approx(0.61 * 64 * (1 - (7 / 8) ** 4), rel=0.03)
    assert distinct_experts(8, 2, 10_000) == pytest.approx(8)


@given(st.integers(1, 512), st.data())
def test_experts_grow_with_rows_and_never_beyond_uniform(experts: int, data: st.DataObject) -> None:
    active = data.draw(st.integers(1, experts))
    rows = data.draw(st.integers(1, 5000))
    found = distinct_experts(experts, active, rows)
    uniform = distinct_experts(experts, active, rows, 1.0)
    assert active - 1e-6 <= found <= uniform + 1e-9 <= experts + 1e-6
    assert distinct_experts(experts, active, rows + 1) >= found - 1e-9


def test_a_mixture_reads_its_active_experts_and_a_batch_widens_the_band() -> None:
    one, four = (predicted(MIXED, device(), Job(64, 64, batch)) for batch in (1, 4))
    expert = 3 * 512 * 1024 * 2
    attn = (2 * 1024 + 2 * 256) * 1024 * 2
    bytes_read = 8 * (attn + 32 * 1024 * 2 + 4 * expert) + 4096 * 1024 * 2
    assert one.token_s == pytest.approx(bytes_read / 20e9, rel=0.05)
    width = [it.band[1] / it.band[0] for it in (one, four)]
    assert width[1] > width[0]
    assert four.token_s > 1.4 * one.token_s


def test_experts_that_are_not_in_memory_come_from_disk() -> None:
    memory = MIXED.weights_bytes // 2
    found = predicted(MIXED, device(), memory=memory)
    plan = streamed(MIXED, memory)
    assert plan.expert_slots
    assert found.token_s == pytest.approx(plan.streamed_bytes / 1e9, rel=0.25)


def test_tables_are_followed_where_a_line_could_not() -> None:
    """A kernel that is quicker with 8 rows than with 7."""
    law = RowsLaw("Q4_K", 4 * MB, (1, 7, 8, 64), (1e-10, 6e-10, 2e-10, 8e-10))
    one = replace(device(), products=(law,))
    matrix = Product("Q4_K", 4096, 1820, 4 * MB)
    found = [product(one, matrix, rows).seconds / matrix.nbytes for rows in (1, 4, 7, 8, 36, 64, 128)]
    assert found == pytest.approx([1e-10, 3.5e-10, 6e-10, 2e-10, 5e-10, 8e-10, 16e-10])
    assert product(one, matrix._replace(kind="F16"), 1).seconds == pytest.approx(4 * MB / 20e9)


def test_size_classes_are_met_halfway() -> None:
    laws = tuple(RowsLaw("Q4_K", nbytes, (1,), (byte_s,)) for nbytes, byte_s in ((1e6, 2e-10), (1e8, 1e-10)))
    one = replace(device(), products=laws)
    found = [
        product(one, Product("Q4_K", 1, 1, size), 1).seconds / size for size in (10**5, 10**6, 10**7, 10**9)
    ]
    assert found == pytest.approx([2e-10, 2e-10, 1.5e-10, 1e-10])


def test_tables_of_experts_are_for_experts() -> None:
    laws = tuple(RowsLaw("Q4_K", size, (1,), (1e-10,)) for size in (1e5, 1e7))
    slow = RowsLaw("Q4_K", 1e6, (1,), (9e-10,), experts=True)
    one = replace(device(), products=(*laws, slow))
    dense = Product("Q4_K", 1, 1, 10**6)
    assert product(one, dense, 1).seconds == pytest.approx(1e-4)
    assert product(one, dense._replace(expert=True), 1).seconds == pytest.approx(9e-4)


FIGURES = ("memory_bytes_per_s", "flops", "disk_bytes_per_s")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([DENSE, MIXED]),
    st.sampled_from(FIGURES),
    st.floats(1.01, 8.0),
    st.floats(1e9, 100e9),
    st.floats(20e9, 2e12),
    st.floats(0.2e9, 8e9),
    st.integers(1, 2000),
    st.integers(1, 8),
    st.sampled_from([0, 2, 3]),
)
def test_faster_hardware_is_never_slower(
    model: Weighed,
    figure: str,
    times: float,
    memory: float,
    flops: float,
    disk: float,
    prompt: int,
    batch: int,
    share: int,
) -> None:
    one = device(memory_bytes_per_s=memory, flops=flops, disk_bytes_per_s=disk)
    plan = streamed(model, model.weights_bytes * share // 4 + 30 * MB) if share else in_ram(model)
    job = Job(prompt, 32, batch)
    slow = cost(model, plan, one, job)
    fast = cost(model, plan, replace(one, **{figure: times * getattr(one, figure)}), job)
    # A block's last read may now share the disk with the next one's: of 1,500 such pairs one takes 1% longer.
    assert fast.token_s <= slow.token_s * 1.02
    assert fast.ttft_s <= slow.ttft_s * 1.02


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([DENSE, MIXED]), st.integers(1, 3000), st.integers(1, 8))
def test_more_to_do_never_takes_less(model: Weighed, prompt: int, batch: int) -> None:
    found = cost(model, in_ram(model), device(), Job(prompt, 16, batch))
    longer = cost(model, in_ram(model), device(), Job(prompt + 64, 16, batch))
    wider = cost(model, in_ram(model), device(), Job(prompt, 16, batch + 1))
    assert longer.token_s >= found.token_s
    assert longer.ttft_s >= found.ttft_s
    assert wider.token_s >= found.token_s
    assert wider.tokens_per_s >= found.tokens_per_s * 0.999


def test_guesses_give_more_tokens_for_more_rows() -> None:
    """On average 1 + 0.8 + 0.64 tokens a step of three rows, which reads dense weights once and more experts."""
    assert Job(1, 1, 1, 2, 0.8).step_tokens == pytest.approx(2.44)
    assert Job(1, 1, 1, 5, 0.0).step_tokens == 1
    assert Job(1, 1, 1, 5, 1.0).step_tokens == 6
    gains = []
    for model in (DENSE, MIXED):
        plain, guessing = (predicted(model, device(), Job(64, 64, 1, *more)) for more in ((), (2, 0.8)))
        assert guessing.tokens_per_s == pytest.approx(1 / guessing.token_s)
        assert guessing.ttft_s == plain.ttft_s
        gains.append(plain.token_s / guessing.token_s)
    assert gains[0] == pytest.approx(2.44, rel=0.03)
    assert 1 < gains[1] < gains[0]


def test_a_share_of_experts_that_is_known_leaves_no_doubt() -> None:
    job = Job(256, 64, 4)
    unsure, least, most = (predicted(MIXED, device(), job._replace(distinct=it)) for it in (None, 0.61, 1.0))
    assert least.token_s <= unsure.token_s <= most.token_s
    assert least.band[1] / least.band[0] < unsure.band[1] / unsure.band[0]


def test_the_parts_of_prompts_are_told_apart_from_those_of_a_token() -> None:
    found = predicted(DENSE, device(), Job(512, 64))
    assert sum(found.prompt_parts.values()) == pytest.approx(found.ttft_s, rel=0.01)
    assert found.prompt_parts["compute"] > found.prompt_parts["memory"]


def test_further_streams_of_a_step_cost_each_and_in_each_layer() -> None:
    own = Overheads(0.0, 0.0, 0.0, 0.0, stream_s=1e-3, stream_layer_s=1e-4)
    plan, job = in_ram(DENSE), Job(64, 64, 4, fresh=0.0)
    plain, costly = (
        cost(DENSE, plan, replace(device(), overheads=it, contention=ALONE), job) for it in (FREE, own)
    )
    assert costly.token_s - plain.token_s == pytest.approx(3 * (1e-3 + 8 * 1e-4))
    assert costly.parts["overhead"] == pytest.approx(3 * (1e-3 + 8 * 1e-4))
    alone = (cost(DENSE, plan, replace(device(), overheads=it), Job(64, 64)).token_s for it in (FREE, own))
    assert len({*alone}) == 1


def test_a_band_is_wider_where_the_profile_differed_from_itself() -> None:
    """By law 15% of what reads memory and 10% of what computes; of repeats that lay a tenth apart, twice that."""
    parts: dict[Binding, float] = {"memory": 3.0, "compute": 1.0, "overhead": 0.0}
    assert uncertainty(parts, True, {}) == pytest.approx((3 * 0.15 + 0.1) / 4)
    found = uncertainty(parts, True, Repeats(memory_apart=0.1).by_part)
    assert found == pytest.approx((3 * 0.25 + 0.1) / 4)
    assert uncertainty({}, True, {}) == MEASURED["overhead"]
    assert uncertainty(parts, False, {}) > found
    one, other = (
        predicted(DENSE, replace(device(measured=True), repeats=it)) for it in (Repeats(), Repeats(0.1, 0.1))
    )
    assert other.band[0] < one.band[0] < one.band[1] < other.band[1]
    assert Repeats(0.1, 0.2).or_more(Repeats(0.3, 0.1, 0.2)) == Repeats(0.3, 0.2, 0.2)


def test_narrow_inputs_have_tables_of_their_own() -> None:
    """In plans that have such inputs, for matrices for which they do, where they were measured."""
    wide, few = (
        RowsLaw("Q4_K", 1e6, (1, 256), (1e-10, 1e-8)),
        RowsLaw("Q4_K", 1e6, (1, 256), (1e-10, 5e-9), 8),
    )
    machine = replace(device(measured=True), products=(few, wide))
    down = Product("Q4_K", 1024, 2048, 1_000_000, narrow=True)
    assert product(machine, down, 256, narrow=True).seconds == pytest.approx(5e-3)
    assert product(machine, down, 256).seconds == pytest.approx(1e-2)
    assert product(machine, down._replace(narrow=False), 256, narrow=True).seconds == pytest.approx(1e-2)
    assert product(replace(machine, products=(wide,)), down, 256, narrow=True).seconds == pytest.approx(1e-2)


def test_prompts_are_quicker_by_the_products_that_are_narrow() -> None:
    """o and down: 1/8 and 1/3 of these layers' weights; decodes wait for memory as before."""
    laws = [
        RowsLaw("BF16", 1e6, (1, 256), (5e-11, 256 * it), bits) for it, bits in ((5e-11, 16), (25e-12, 8))
    ]
    machine = replace(device(measured=True), products=tuple(laws))
    products = {
        block: tuple(it._replace(narrow=place == len(its) - 1) for place, it in enumerate(its))
        for block, its in DENSE.products.items()
    }
    model = replace(DENSE, products=products)
    plans = [replace(in_ram(model), narrow_inputs=narrow) for narrow in (False, True)]
    before, after = (
        cost(model, it, replace(machine, overheads=FREE, contention=ALONE), Job(256, 2)) for it in plans
    )
    assert after.token_s == pytest.approx(before.token_s, rel=1e-6)
    layers = [it for block, its in products.items() for it in its if block.kind in ("attn", "ffn")]
    narrow = sum(it.nbytes for it in layers if it.narrow) / sum(it.nbytes for it in layers)
    assert after.ttft_s < before.ttft_s * (1 - 0.4 * narrow)
