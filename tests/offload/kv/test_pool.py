"""The KV pool: no page belongs to two sequences, pages take the bytes that the plan says, and copies are complete."""

from __future__ import annotations

import mmap
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels import home_of
from shoal.kernels.arrays import Floats
from shoal.kernels.attention_operands import Scoring
from shoal.models.rope import Rope
from shoal.models.step import Step
from shoal.offload.kv.pages import PageTable
from shoal.offload.kv.pool import KvPool
from shoal.offload.kv.prefix_cache import Copy
from shoal.partition.memory_layout import KV_FORMATS, PAGE_TOKENS, kv_page_bytes
from shoal.partition.plan import KvPlan
from shoal.partition.spec import LayerSpec, ModelSpec, RopeSpec

SPEC = ModelSpec(
    family="llama", layers=(LayerSpec(), LayerSpec()), hidden=8, vocab=16, context=512, heads=2, kv_heads=1,
    head_dim=24, ffn=8, ropes=(RopeSpec(24, 10000.0),),
)  # fmt: skip
ROPE = Rope(SPEC.ropes[0], 512)


def pool(pages: int, dtype: str = "f32") -> KvPool:
    return KvPool(SPEC, KvPlan(pages, PAGE_TOKENS, dtype, 0))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_pages_are_owned_once(actions: list[tuple[bool, int]]) -> None:
    table = PageTable(16)
    owned: list[list[int]] = []
    for take, count in actions:
        if take:
            free = table.free_pages
            pages = table.take(count)
            assert (pages is None) == (count > free)
            if pages is not None:
                assert len(pages) == count
                owned.append(pages)
        elif owned:
            table.give_back(owned.pop(count % len(owned)))
        flat = [page for pages in owned for page in pages]
        assert len(flat) == len(set(flat)) == 16 - table.free_pages


def test_the_lowest_pages_are_taken_first() -> None:
    table = PageTable(8)
    first, second, _ = table.take(2), table.take(2), table.take(1)
    assert first is not None
    assert second is not None
    table.give_back(second)
    table.give_back(first)
    assert table.take(4) == [0, 1, 2, 3]


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 4242, raising=False)  # refused, as by such a kernel
    assert not pool(3).page(2).any()


def attend(kv: KvPool, layer: int, pages: list[int], start: int, rows: Floats) -> Floats:
    """rows (T, 4 * head_dim): two heads of q, k and v of positions from `start` on."""
    step = Step.build([([0] * len(rows), start, pages, 1)])
    q, k, v = np.split(rows, [48, 72], axis=1)
    (part,) = step.parts
    rotation = ROPE.at(part.positions)
    return home_of("cpu").attention(kv.layers[layer], part.segments, q, k, v, Scoring(rotation, 0.5))


@pytest.mark.parametrize("dtype", sorted(KV_FORMATS))
def test_a_pool_takes_what_the_plan_says(dtype: str) -> None:
    for spec in (SPEC, replace(SPEC, head_dim=64)):
        taken = KvPool(spec, KvPlan(3, PAGE_TOKENS, dtype, 0)).nbytes
        assert taken == 3 * kv_page_bytes(spec, dtype)
    assert kv_page_bytes(replace(SPEC, head_dim=128), "i8") == PAGE_TOKENS * 2 * 2 * (128 + 4)


@pytest.mark.parametrize("dtype", sorted(KV_FORMATS))
def test_a_copied_page_serves_as_the_original(dtype: str) -> None:
    rows = np.random.default_rng(0).standard_normal((PAGE_TOKENS + 9, 96), np.float32)
    kv = pool(4, dtype)
    for layer in (0, 1):
        attend(kv, layer, [0, 1], 0, rows[:-2])
    kv.move([Copy(1, 3)])
    for layer in (0, 1):
        original = attend(kv, layer, [0, 1], len(rows) - 2, rows[-2:])
        assert np.array_equal(attend(kv, layer, [0, 3], len(rows) - 2, rows[-2:]), original)


def test_layers_do_not_share_pages() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 5, 96), np.float32)
    kv = pool(1)
    alone = attend(kv, 0, [0], 0, rows[0])
    attend(kv, 1, [0], 0, rows[1])
    assert np.array_equal(attend(kv, 0, [0], 4, rows[0, 4:]), alone[4:])


def test_angles_of_a_position_do_not_depend_on_the_step() -> None:
    rope = Rope(replace(SPEC.ropes[0], magnitude=1.1, interleaved=True), 512)
    together = rope.at(np.arange(300))
    for position in (0, 7, 299):
        alone = rope.at(np.array([position]))
        assert np.array_equal(alone.cos[0], together.cos[position])
        assert np.array_equal(alone.sin[0], together.sin[position])
