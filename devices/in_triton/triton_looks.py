"""Attention of texts that have one row in a step, launched: sizes of programs, and what they leave for each other.
`triton_attention` has the kernels."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from shoal.kernels.attention_operands import KvPages, Scoring, Segments
from shoal.kernels.attention_reference import PagesIn, numbers_of, scales_of
from shoal.partition.memory_layout import LOOKED_PAGES, LOOKED_TOGETHER, PAGE_TOKENS

from ..on_device import table_at
from . import triton_attention as launched

NUMBERS = 4096  # of keys with queries, that a program has at once
LEAST_TOKENS = 2
MOST_TOKENS = 64  # of a page
JOINED = 16  # parts of a text at once
WARPS = 4
REGISTERS = 136  # that a thread of `looked` may have: with 128, at which the assembler aims, some spill


def can_look(kv: KvPages) -> bool:
    """Whether these kernels have room for its heads."""
    return _tokens(kv) >= LEAST_TOKENS


def look(
    kv: KvPages,
    segments: Segments,
    places: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    out: Tensor,
) -> None:
    """Into the rows of `out` (T, heads * head_dim) of texts that have one row. Arguments as of `OnDevice.attention`."""
    rotation, scale, window, norms = scoring
    layout, texts, kv_heads = kv.layout, len(segments.table), kv.kv_heads
    there = PagesIn(layout, _there(kv.data))
    pages, table = places, places[table_at(segments) :]
    numbers, scaled = numbers_of(there), layout.kind.scaled
    scales = scales_of(there) if scaled else numbers
    how = {
        "HEADS": kv.heads, "KV_HEADS": kv_heads, "DIM": layout.head_dim, "WIDE": layout.wide,
        "ROOM": triton.next_power_of_2(layout.wide), "SCALED": scaled,
        "HEAD_STEP": numbers.stride(1), "SCALES_HEAD_STEP": scales.stride(1),
    }  # fmt: skip
    steps = numbers.stride(0), scales.stride(0)
    turned = q.new_empty(texts, kv.heads, layout.head_dim)
    q, k, v = (x.contiguous() for x in (q, k, v))
    cos, sin = _there(rotation.cos), _there(rotation.sin)
    launched.stored[(texts, kv.heads + 2 * kv_heads)](
        q, k, v, *((norms.q, norms.k) if norms else (q, q)), cos, sin,
        table, pages, numbers, scales, turned, norms.eps if norms else 0.0, *steps,
        DIMS=rotation.dims, INTERLEAVED=rotation.interleaved, NORMED=norms is not None, **how,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    how |= {
        "GROUP_ROOM": triton.next_power_of_2(kv.heads // kv_heads), "SOME": _tokens(kv), "EACH": LOOKED_PAGES,
        "WINDOW": window or 0,
    }  # fmt: skip
    parts = -(-_most_pages(segments) // LOOKED_PAGES)
    if parts == 1:
        launched.looked[(1, kv_heads, texts)](
            turned, table, pages, numbers, scales, out, q, q, scale, *steps, 1, WHOLE=True, **how,
            num_warps=WARPS, num_stages=1, maxnreg=REGISTERS,
        )  # fmt: skip
        return
    each = max(1, LOOKED_TOGETHER // (kv.heads * parts * (layout.head_dim + 2)))
    for first in range(0, texts, each):
        some, its = min(each, texts - first), table[4 * first :]
        found = q.new_empty(some, kv.heads, parts, layout.head_dim)
        sums, largest = (q.new_empty(some, kv.heads, parts) for _ in range(2))
        launched.looked[(parts, kv_heads, some)](
            turned[first:], its, pages, numbers, scales, found, sums, largest, scale, *steps, parts, WHOLE=False,
            **how, num_warps=WARPS, num_stages=1, maxnreg=REGISTERS,
        )  # fmt: skip
        launched.joined[(kv.heads, some)](
            found, sums, largest, its, out, parts, HEADS=kv.heads, DIM=layout.head_dim, ROOM=how["ROOM"],
            EACH=LOOKED_PAGES, SOME=JOINED, num_warps=WARPS, num_stages=1,
        )  # fmt: skip


def _there(handle: Any) -> Tensor:
    inside: Tensor = handle.inside
    return inside


def _tokens(kv: KvPages) -> int:
    return tokens_of(*(triton.next_power_of_2(it) for it in (kv.heads // kv.kv_heads, kv.layout.wide)))


def tokens_of(group: int, room: int) -> int:
    """That a program looks at together, if so many heads share one of K and V, of so many numbers: a power of 2."""
    return min(MOST_TOKENS, NUMBERS // (group * room))


def _most_pages(segments: Segments) -> int:
    """Of a text with one row."""
    table = segments.table
    last: int = table[table[:, 1] == 1, 2].max().item()
    return last // PAGE_TOKENS + 1
