"""The KV pool: fixed-size pages of K and V, shared by all sequences of a model.

Knows pages, who may use them is the scheduler's business. A page holds `page_tokens` positions of every layer.
Memory is touched only when written, so a large pool costs nothing until it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.attention import attention
from shoal.models.step import Segment, Step
from shoal.partition.plan import KvPlan
from shoal.partition.spec import ModelSpec

from .pages import PageTable

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class KvPool:
    """K and V of every layer, each (kv_heads, pages * page_tokens, head_dim)."""

    def __init__(self, spec: ModelSpec, plan: KvPlan) -> None:
        self.page_tokens = plan.page_tokens
        self.table = PageTable(plan.pages)
        shape = (2, spec.kv_heads, plan.tokens, spec.head_dim)
        self._layers = [torch.empty(shape, dtype=_DTYPES[plan.dtype]) for _ in spec.layers]

    def attend(
        self,
        layer: int,
        step: Step,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Store the step's k and v (T, kv_heads, head_dim), then attend with q (T, heads, head_dim), every token to
        its sequence up to itself (with `window`, position p sees (p - window, p]); (T, heads * head_dim) f32."""
        outputs = []
        for segment in step.segments:
            rows = slice(segment.first, segment.last)
            keys, values = self._extend(layer, segment, k[rows], v[rows])
            outputs.append(attention(q[rows], keys, values, scale=scale, window=window))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` hold what page `source` holds, in every layer."""
        first, second = (
            slice(page * self.page_tokens, (page + 1) * self.page_tokens) for page in (source, target)
        )
        for layer in self._layers:
            layer[:, :, second] = layer[:, :, first]

    def _slots(self, segment: Segment) -> slice | Tensor:
        """Where positions [0, segment.end) live in the pool."""
        used = segment.pages[: -(-segment.end // self.page_tokens)]
        if used[-1] - used[0] == len(used) - 1 and list(used) == sorted(used):
            first = used[0] * self.page_tokens
            return slice(first, first + segment.end)
        offsets = torch.arange(self.page_tokens)
        return (torch.tensor(used)[:, None] * self.page_tokens + offsets).flatten()[: segment.end]

    def _extend(self, layer: int, segment: Segment, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (T, kv_heads, head_dim) at the segment's positions; return the whole sequence's K and V,
        each (kv_heads, segment.end, head_dim): views when its slots are a slice, else copies."""
        keys, values = self._layers[layer]
        slots = self._slots(segment)
        if isinstance(slots, slice):
            new = slice(slots.start + segment.start, slots.stop)
            keys[:, new] = k.transpose(0, 1)
            values[:, new] = v.transpose(0, 1)
            return keys[:, slots], values[:, slots]
        fresh = slots[segment.start :]
        keys[:, fresh] = k.transpose(0, 1).to(keys.dtype)
        values[:, fresh] = v.transpose(0, 1).to(values.dtype)
        return keys[:, slots], values[:, slots]
