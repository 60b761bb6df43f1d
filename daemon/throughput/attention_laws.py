"""Measures what attention takes on this machine, by what is seen.

Computes on the threads that kernels are set to, so nothing else should compute meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from statistics import median

import numpy as np

from shoal.kernels import ComputeHome
from shoal.kernels.attention_operands import KvPages, Rotation, Scoring, Segments, kv_layout
from shoal.kernels.huge_pages import Arena
from shoal.partition.memory_layout import KV_FORMATS, PAGE_TOKENS
from shoal.partition.throughput.profile import AttentionLaw

from .kernel_laws import ROUNDS, Pool, passing, usual_s

KV_HEADS, HEAD_DIMS = 4, (64, 128)
QUERIES = (1, 4)  # of each head of K and V
CONTEXTS = (64, 512, 2048)
CHUNK_ROWS = 64
KV_COPIES = 6  # of the longest context: calls go round through their pages, so that K and V are cold
SMALL_HEAD_DIM = 32  # of a call that counts as a layer's


def attention_laws(
    home: ComputeHome, pool: Pool, done: Callable[[str], None], kv_types: Iterable[str] = KV_FORMATS
) -> Iterator[AttentionLaw]:
    """For each type of K and V, decodes and chunks of prompts by what they see. What a call with small heads takes for
    a text that has just begun is no number's: a layer costs it anyhow (`fixed_costs`). Storing K and V is."""
    for kv_type, dim in product(kv_types, HEAD_DIMS):
        small = _kv_pages(kv_type, SMALL_HEAD_DIM, 1)
        call_s = median(_attention_s(home, pool, small, 1, 1) for _ in range(ROUNDS))
        for queries in QUERIES:
            heads = queries * KV_HEADS
            kv = _kv_pages(kv_type, dim, queries)
            points: list[list[float]] = []
            for rows in (1, CHUNK_ROWS):
                points.append([])
                for context in CONTEXTS:
                    done(f"attention, {kv_type}")
                    seconds = median(_attention_s(home, pool, kv, rows, context) for _ in range(ROUNDS))
                    seen = rows * max(context, (rows + 1) / 2)
                    points[-1].append(max(0.05 * seconds, seconds - call_s) / (seen * heads * dim))
            decode_s, prompt_s = map(tuple, points)
            yield AttentionLaw(kv_type, CONTEXTS, decode_s, prompt_s, queries, dim)


def _kv_pages(kv_type: str, dim: int, queries: int) -> KvPages:
    layout = kv_layout(kv_type, dim)
    pages = KV_COPIES * ((CONTEXTS[-1] + CHUNK_ROWS) // PAGE_TOKENS + 1)
    memory = Arena().take(pages * KV_HEADS * layout.head_bytes)
    memory[:] = 0  # every page has to be there
    return KvPages(layout, queries * KV_HEADS, memory.reshape(pages, KV_HEADS, layout.head_bytes))


def _attention_s(home: ComputeHome, pool: Pool, kv: KvPages, rows: int, context: int) -> float:
    """Of a call; rows see `context` tokens on average."""
    start = max(0, context - (rows + 1) // 2)
    dim = kv.layout.head_dim
    q, k, v = (
        home.place(np.full((rows, heads * dim), 0.1, np.float32)) for heads in (kv.heads, KV_HEADS, KV_HEADS)
    )
    angles = np.zeros((rows, dim // 2), np.float32)
    scoring = Scoring(Rotation(dim, False, angles + 1, angles), dim**-0.5)
    its = -(-(start + rows) // PAGE_TOKENS)  # pages of a text
    passed = passing(home, pool)

    def calls() -> Iterator[Callable[[], object]]:
        while True:
            for first in range(0, kv.pages - its + 1, its):
                if rows >= CHUNK_ROWS:
                    passed()
                segments = Segments.build([(rows, start, list(range(first, first + its)))])
                yield partial(home.attention, kv, segments, q, k, v, scoring)

    return usual_s(calls())
