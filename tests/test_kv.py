"""The KV pool: pages never belong to two sequences, and scattered pages read like consecutive ones."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.models.step import Segment
from shoal.offload.kv import KvPool, PageTable
from shoal.partition.plan import KvPlan
from shoal.partition.spec import LayerSpec, ModelSpec, RopeSpec

SPEC = ModelSpec(
    family="llama", layers=(LayerSpec(),), hidden=8, vocab=16, context=64, heads=2, kv_heads=2, head_dim=4, ffn=8,
    ropes=(RopeSpec(4, 10000.0),),
)  # fmt: skip


def pool(pages: int, page_tokens: int = 4, dtype: str = "f32") -> KvPool:
    return KvPool(SPEC, KvPlan(pages, page_tokens, dtype, 0))


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


def test_consecutive_pages_are_preferred() -> None:
    table = PageTable(8)
    first, second, _ = table.take(2), table.take(2), table.take(1)
    assert first is not None
    assert second is not None
    table.give_back(first)
    table.give_back(second)
    assert table.take(4) == [0, 1, 2, 3]


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(5)), st.integers(1, 18), st.integers(0, 18))
def test_scattered_pages_equal_consecutive_ones(pages: list[int], length: int, start: int) -> None:
    start = min(start, length - 1)
    k, v = torch.randn(2, length, SPEC.kv_heads, SPEC.head_dim).unbind(0)
    results = []
    for owned in ([0, 1, 2, 3, 4], list(pages)):
        kv = pool(5)
        if start:
            kv.extend(0, Segment(0, start, 0, kv.slots(owned, start)), k[:start], v[:start])
        results.append(
            kv.extend(0, Segment(0, length - start, start, kv.slots(owned, length)), k[start:], v[start:])
        )
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)
    assert torch.equal(results[1][0], k.transpose(0, 1))
