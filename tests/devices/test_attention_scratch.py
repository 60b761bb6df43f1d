"""Attention in torch takes no more of a device's memory than plans give it, also where torch has all scores of its
operands at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fakes.throughput.throughput_cases import spec, wanted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from shoal.kernels import attention_reference
from shoal.kernels.attention_reference import Angles, PagesIn, attend_tensors
from shoal.partition import placement
from shoal.partition.memory_layout import KV_FORMATS, PAGE_TOKENS, KvLayout
from shoal.partition.placement import DeviceRoom, device_scratch_bytes


def most_held(call: Any) -> int:
    """Bytes that it has at once, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as noted:
        call()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in noted.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    held = most = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        held += nbytes
        most = max(most, held)
    return most


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([64, 128]),
    st.sampled_from(sorted(KV_FORMATS)),
    st.lists(st.sampled_from([1, 2, 17, 64]), min_size=1, max_size=3),
    st.sampled_from([300, 1000, 2048]),
    st.sampled_from([None, 200]),
    st.sampled_from([1 << 16, 1 << 20, 1 << 25]),
)
def test_what_plans_give_suffices(
    kv_heads: int,
    group: int,
    dim: int,
    kind: str,
    rows: list[int],
    context: int,
    window: int | None,
    scores: int,
) -> None:
    layout, heads, tokens = KvLayout.of(KV_FORMATS[kind], dim), kv_heads * group, sum(rows)
    pages = -(-context // PAGE_TOKENS)
    kv = PagesIn(layout, torch.zeros(pages, kv_heads, layout.head_bytes, dtype=torch.uint8))
    table = [(sum(rows[:place]), its, context - its, 0) for place, its in enumerate(rows)]
    q, k, v = (torch.randn(tokens, its * dim) for its in (heads, kv_heads, kv_heads))
    angles = Angles(dim, False, torch.ones(tokens, dim // 2), torch.zeros(tokens, dim // 2))
    model = spec(heads=heads, kv_heads=kv_heads, head_dim=dim)
    asked = wanted(model, context_tokens=context, chunk_tokens=max(rows), sequences=len(rows), kv_type=kind)
    numbers = torch.arange(pages, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention_reference, placement):
            patch.setattr(module, "SCORES_TOGETHER", scores)
        given_bytes = device_scratch_bytes(asked, DeviceRoom("card", 0, 0, True, 0))
        with sdpa_kernel(SDPBackend.MATH):
            held = most_held(
                lambda: attend_tensors(kv, table, numbers, q, k, v, angles, None, dim**-0.5, window)
            )
    assert held <= given_bytes
