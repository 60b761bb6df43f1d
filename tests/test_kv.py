"""The KV pool: pages never belong to two sequences, and scattered pages read like consecutive ones."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.models.step import Step
from shoal.offload.kv import KvPool
from shoal.offload.pages import PageTable
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


def attend(kv: KvPool, pages: list[int], start: int, rows: Tensor) -> Tensor:
    """rows (3, T, heads, head_dim): q, k and v of positions from `start` on."""
    step = Step.build([([0] * rows.shape[1], start, pages, 1)])
    return kv.attend(0, step, *rows.unbind(0), scale=0.5, window=None)


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(5)), st.integers(1, 18), st.integers(0, 18))
def test_scattered_pages_equal_consecutive_ones(pages: list[int], length: int, start: int) -> None:
    start = min(start, length - 1)
    qkv = torch.randn(3, length, SPEC.kv_heads, SPEC.head_dim)
    results = []
    for owned in ([0, 1, 2, 3, 4], list(pages)):
        kv = pool(5)
        if start:
            attend(kv, owned, 0, qkv[:, :start])
        results.append(attend(kv, owned, start, qkv[:, start:]))
    assert torch.equal(*results)


def test_a_copied_page_serves_as_the_original() -> None:
    qkv = torch.randn(3, 8, SPEC.kv_heads, SPEC.head_dim)
    kv = pool(4)
    attend(kv, [0, 1], 0, qkv[:, :7])
    kv.copy_page(1, 3)
    assert torch.equal(attend(kv, [0, 3], 7, qkv[:, 7:]), attend(kv, [0, 1], 7, qkv[:, 7:]))
