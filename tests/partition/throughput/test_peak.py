"""What a job has in memory at most, as it can be worked out by hand; and that a plan's account has room for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes.throughput.throughput_cases import DENSE, MB, MIXED, device, spec, wanted, weighed

from shoal.partition.memory_layout import HUGE_BYTES, PAGE_TOKENS
from shoal.partition.plan import Plan, least_in_ram, plan_in_ram, scratch_bytes
from shoal.partition.spec import MoeSpec
from shoal.partition.throughput import peak
from shoal.partition.throughput.cost import cost
from shoal.partition.throughput.peak import RESIDENT_BYTES, peak_bytes, step_bytes
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.weights_of import Weighed

MIXTURES = {
    "two large experts": (4096, 32, 8, MoeSpec(8, 2, 14336, True)),
    "many small ones": (2048, 32, 4, MoeSpec(128, 8, 768, True)),
    "as many heads of K and V": (2048, 16, 16, MoeSpec(64, 8, 1024, True)),
    "beside a large shared one": (3584, 28, 4, MoeSpec(64, 8, 2560, True, 20480)),
    "many large ones": (2048, 16, 4, MoeSpec(32, 8, 4096, True)),
}


def in_ram(model: Weighed) -> Plan:
    plan = plan_in_ram(wanted(model.spec), model.block_bytes, memory_bytes=10**12)
    assert isinstance(plan, Plan)
    return plan


def test_peak_is_that_of_the_job() -> None:
    """Weights, the tokenizer, pages of K and V of all that was answered, also of those that were only begun, in huge
    pages of the system, as far as there are any, and what the longest step touches."""
    plan = in_ram(DENSE)
    page_bytes = plan.kv.nbytes // plan.kv.pages
    assert plan.kv.pages == 16
    assert 4 * page_bytes == HUGE_BYTES
    assert plan.pinned_bytes % HUGE_BYTES == 0
    held = RESIDENT_BYTES + plan.pinned_bytes

    def kv(job: Job, times: int = 1) -> int:
        return peak_bytes(DENSE, plan, job, times) - held - step_bytes(DENSE, plan, job)

    short = Job(3 * PAGE_TOKENS - 16, 16)
    assert [kv(short, times) // page_bytes for times in (1, 2, 3, 1000)] == [4, 8, 12, 16]
    begun = Job(PAGE_TOKENS // 2, 1)
    assert [kv(begun, times) // page_bytes for times in (1, 4, 5, 1000)] == [4, 4, 8, 16]
    least = peak_bytes(DENSE, plan, short)
    assert peak_bytes(replace(DENSE, tokenizer_bytes=5 * MB), plan, short) == least + 5 * MB
    assert cost(DENSE, plan, device(), short).peak_bytes == {"one": least}
    assert peak_bytes(DENSE, replace(plan, window_bytes=1000), short) == least + HUGE_BYTES
    scarce = replace(plan, scratch_bytes=1000)
    assert peak_bytes(DENSE, scarce, short) == held + 4 * page_bytes + 1000, "no more than the plan has"


def test_a_step_touches_what_its_rows_need() -> None:
    """A prompt of 64 tokens in 16 heads of 64 with 4 of K and V: its rows, a block's sum, q, what attention makes of
    it, k, v, and angles; logits of one; kernels pack floats as they are, quantised rows with their norm in 2.5 bytes a
    number. Of rows that are too many for a tile of weights, 96 are packed, but with experts all, twice."""
    plan, job = in_ram(DENSE), Job(64, 16)
    rows = 2 * 1024 + 2 * (16 + 4) * 64 + 64
    threads = 2 * peak._THREAD_BYTES
    assert step_bytes(DENSE, plan, job) == 4 * (64 * rows + 4096) + 64 * 4 * (1024 + 4096) + threads
    long = Job(256, 16)
    assert step_bytes(DENSE, plan, long) == 4 * (256 * rows + 4096) + 96 * 4 * (1024 + 4096) + threads
    quantised = weighed(spec(), 0.5, "Q4_K")
    packed = 64 * (4 * 1024 + 2.5 * (1024 + 4096))
    assert step_bytes(quantised, in_ram(quantised), job) == 4 * (64 * rows + 4096) + packed + threads
    experts = weighed(MIXED.spec, 0.5, "Q4_K")
    packed = 2 * 256 * 2.5 * (1024 + 4 * 512)
    assert step_bytes(experts, in_ram(experts), long) == 4 * (256 * rows + 4096) + packed + threads
    twice = Job(64, 16, 2)  # as many logits as there are streams, but no more than the plan has
    wide = in_ram(DENSE), replace(in_ram(DENSE), sequences=2)
    two, four = (step_bytes(DENSE, it, twice) for it in wide)
    assert four - two == 4 * 4096
    parts = replace(plan, part_tokens=64)
    assert step_bytes(DENSE, plan, long) > step_bytes(DENSE, parts, long) > step_bytes(DENSE, plan, job)


@pytest.mark.parametrize("name", ["dense", *MIXTURES])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_what_a_step_touches_is_within_the_plans_account(name: str, threads: int) -> None:
    model = DENSE
    if name in MIXTURES:
        hidden, heads, kv_heads, moe = MIXTURES[name]
        sizes = {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": 128, "ffn": 0}
        model = weighed(spec(2, moe, **sizes), 0.5, "Q4_K")
    asked = wanted(model.spec, context_tokens=4096, sequences=16, threads=threads)
    for part_tokens in (None, 32, 64):
        plan = replace(least_in_ram(asked, model.block_bytes), part_tokens=part_tokens or 1 << 30)
        for job in (Job(4000, 96, 16), Job(256, 16), Job(16, 16, 16), Job(1, 4000)):
            assert step_bytes(model, plan, job) <= scratch_bytes(asked, part_tokens)
