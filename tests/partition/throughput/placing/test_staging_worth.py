"""From how many tokens on experts should come to a device: as the formula says, and by what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.hardware_guesses import FAST_FLOPS, FAST_MEMORY_BYTES_PER_S
from shoal.partition.placement import ExpertTimes
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, MoeSpec, RopeSpec
from shoal.partition.throughput.placing.staging_worth import staged_from
from shoal.partition.throughput.profile import ANY, Corrections, Device, RowsLaw, unmeasured
from shoal.partition.throughput.weights_of import Product, Weighed

HIDDEN, FFN, LAYERS, EXPERTS, ACTIVE = 2048, 768, 3, 128, 8
SPEC = ModelSpec(
    family="qwen3_moe", layers=(LayerSpec(moe=True),) * LAYERS, hidden=HIDDEN, vocab=1000, context=4096, heads=8,
    kv_heads=2, head_dim=32, ffn=FFN, ropes=(RopeSpec(32, 10000.0),),
    moe=MoeSpec(experts=EXPERTS, active=ACTIVE, ffn=FFN, normalize=True),
)  # fmt: skip
DENSE = replace(SPEC, layers=(LayerSpec(),) * LAYERS, moe=None)
EXPERT_BYTES = 3 * HIDDEN * FFN * 2
MOST = 1 << 16


def model(spec: ModelSpec = SPEC) -> Weighed:
    shapes = ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN))
    expert = tuple(Product("BF16", rows, cols, 2 * rows * cols) for rows, cols in shapes)
    products = {
        block: expert if block.kind == ("expert" if spec.moe else "ffn") else () for block in spec.blocks()
    }
    sizes = {block: sum(it.nbytes for it in its) for block, its in products.items()}
    products[BlockId("head")] = ()
    return Weighed(spec, "keep", products, sizes, sizes, 0, 0)


def cpu(flops: float, memory: float = 1e15) -> Device:
    return Device("cpu", 1e12, memory, flops, measured=True)


def there(link: float, flops: float = 1e16) -> ExpertTimes:
    return ExpertTimes(EXPERT_BYTES, EXPERT_BYTES / link, 64, EXPERT_BYTES * 64 / flops)


@pytest.mark.parametrize(("compute", "link"), [(1e12, 25e9), (2e12, 12e9), (0.7e12, 16e9)])
def test_about_as_the_formula_says(compute: float, link: float) -> None:
    """Where all experts are used, and the device itself takes no time."""
    bytes_per_weight = 2
    expected = EXPERTS / ACTIVE * bytes_per_weight / 2 * compute / link
    # Hidden states that need not go out and come back, two f32 of each token.
    carried = 2 * 4 * HIDDEN / link / (ACTIVE * 3 * HIDDEN * FFN * 2 / compute)
    assert staged_from(model(), cpu(compute), there(link), MOST) == pytest.approx(
        expected / (1 + carried), rel=0.01
    )


def test_by_what_running_taught_of_the_processor() -> None:
    slow = replace(cpu(2e12), corrections=Corrections(compute=2.0))
    expected = staged_from(model(), cpu(1e12), there(25e9), MOST)
    assert staged_from(model(), slow, there(25e9), MOST) == expected


def test_by_the_tables_of_the_processor() -> None:
    """Reading takes 1 / 20e9 s a byte, each row a twentieth more: from 16 rows on a copy at 11.4e9 is quicker."""
    rows, link = 16, 20e9 / (1 + 15 / 20)
    law = RowsLaw(ANY, 1.0, (1, 256), (1 / 20e9, (1 + 255 / 20) / 20e9))
    machine = replace(cpu(1e12, 20e9), products=(law,))
    found = staged_from(model(), machine, there(link), MOST)
    assert found * ACTIVE / EXPERTS == pytest.approx(rows, rel=0.05)


def test_never_where_it_is_never_quicker() -> None:
    assert staged_from(model(), cpu(1e12), there(25e9), 100) == 0  # steps are too short
    assert staged_from(model(), cpu(1e12), there(25e9, flops=1e9), MOST) == 0  # a slow device
    assert staged_from(model(), cpu(1e8, 1e8), there(1e12), MOST) == 1  # a slow processor
    assert staged_from(model(DENSE), cpu(1e12), there(25e9), 30) == 0


@pytest.mark.parametrize(("compute", "link"), [(1e12, 25e9), (2e12, 12e9), (0.7e12, 16e9)])
def test_a_feed_forward_is_the_one_expert_that_all_tokens_use(compute: float, link: float) -> None:
    expected = compute / link
    carried = 2 * 4 * HIDDEN / link / (3 * HIDDEN * FFN * 2 / compute)
    found = staged_from(model(DENSE), cpu(compute), there(link), MOST)
    assert found == pytest.approx(expected / (1 - carried), rel=0.03)


def test_a_machine_of_which_nobody_has_said_anything_is_taken_for_a_fast_one() -> None:
    slow = unmeasured(4)
    found = staged_from(model(), slow, there(25e9), MOST)
    assert found > 10 * max(1, staged_from(model(), replace(slow, guessed=False), there(25e9), MOST))
    assert found == staged_from(model(), cpu(FAST_FLOPS, FAST_MEMORY_BYTES_PER_S), there(25e9), MOST)


@settings(max_examples=25)
@given(st.floats(1e11, 1e13), st.floats(1e9, 1e11), st.floats(1.1, 4))
def test_the_quicker_the_link_the_sooner(compute: float, link: float, times: float) -> None:
    few, many = (staged_from(model(), cpu(compute), there(by), MOST) for by in (link * times, link))
    assert few
    assert few <= many or not many
    faster = staged_from(model(), cpu(compute * times), there(link), MOST)
    assert faster >= many or not faster
