"""The KV pool: fixed-size pages of K and V, shared by all sequences of a model.

Knows pages, who may use them is the scheduler's business. A page holds `page_tokens` positions of every layer.
Memory is touched only when written, so a large pool costs nothing until it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.models.step import Segment
from shoal.partition.plan import KvPlan
from shoal.partition.spec import ModelSpec

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class PageTable:
    """Which pages are free. Pure bookkeeping; prefers runs of consecutive pages, which read without a copy."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = [True] * pages
        self.free_pages = pages

    def take(self, count: int) -> list[int] | None:
        """`count` pages, consecutive when there is such a run (lowest first), else any; None when too few are free."""
        if count > self.free_pages:
            return None
        taken = self._run(count) or [page for page, free in enumerate(self._free) if free][:count]
        for page in taken:
            self._free[page] = False
        self.free_pages -= count
        return taken

    def give_back(self, pages: list[int]) -> None:
        for page in pages:
            assert not self._free[page], page
            self._free[page] = True
        self.free_pages += len(pages)

    def _run(self, count: int) -> list[int] | None:
        length = 0
        for page, free in enumerate(self._free):
            length = length + 1 if free else 0
            if length == count:
                return list(range(page - count + 1, page + 1))
        return None


class KvPool:
    """K and V of every layer, each (kv_heads, pages * page_tokens, head_dim)."""

    def __init__(self, spec: ModelSpec, plan: KvPlan) -> None:
        self.page_tokens = plan.page_tokens
        self.table = PageTable(plan.pages)
        shape = (2, spec.kv_heads, plan.tokens, spec.head_dim)
        self._layers = [torch.empty(shape, dtype=_DTYPES[plan.dtype]) for _ in spec.layers]

    def slots(self, pages: list[int], length: int) -> slice | Tensor:
        """Where positions [0, length) of a sequence with these pages live in the pool."""
        used = pages[: -(-length // self.page_tokens)]
        if used[-1] - used[0] == len(used) - 1 and used == sorted(used):
            first = used[0] * self.page_tokens
            return slice(first, first + length)
        offsets = torch.arange(self.page_tokens)
        return (torch.tensor(used)[:, None] * self.page_tokens + offsets).flatten()[:length]

    def extend(self, layer: int, segment: Segment, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (T, kv_heads, head_dim) at the segment's positions; return the whole sequence's K and V,
        each (kv_heads, segment.end, head_dim): views when its slots are a slice, else copies."""
        keys, values = self._layers[layer]
        slots = segment.slots
        if isinstance(slots, slice):
            new = slice(slots.start + segment.start, slots.stop)
            keys[:, new] = k.transpose(0, 1)
            values[:, new] = v.transpose(0, 1)
            return keys[:, slots], values[:, slots]
        fresh = slots[segment.start :]
        keys[:, fresh] = k.transpose(0, 1).to(keys.dtype)
        values[:, fresh] = v.transpose(0, 1).to(values.dtype)
        return keys[:, slots], values[:, slots]
