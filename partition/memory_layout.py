"""How weights and KV lie in memory: the numbers that the kernels fix and that plans count with.

In Python these numbers are written here alone; `kernels/native` has them in C++. Knows sizes in rows, tokens and bytes;
not arrays, nor what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from .spec import ModelSpec

BAND_ROWS = 16  # rows of a quantised matrix that lie together; a matrix is only cut between bands
INPUT_GROUP = 32  # columns of an input to quantised weights that are rounded together

PAGE_TOKENS = 64  # positions in a page of KV
VALUE_STEP = 16  # rows of V are filled up to multiples of this many numbers: whole vectors
SCALE_BYTES = 4  # of an f32

STAGED_STARTS = (
    256  # weights that come and go begin at multiples of so many bytes, which are quick to read from
)
LOADING_BYTES = 32 << 20  # memory in which blocks lie on their way to a device, besides the largest of them
MOST_MATRICES = 5  # of a block: a router with a shared expert

KERNEL_BYTES = 4 << 20  # scratch of the kernels for any model, and …
THREAD_BYTES = 1 << 20  # … for each of their threads besides
TILE_TOKENS = 96  # rows that share a tile of weights: for so many at once inputs are packed …
PACKED_BYTES = 80  # … of which a group takes this much at most
HUGE_BYTES = 2 << 20  # of a page of the system in which weights and KV lie
SPAN_TOKENS = 256  # attention to a long context is computed in spans of this many tokens …
SPANS_BYTES = 16 << 20  # … whose results take at most this much
LOOKED_PAGES = 2  # of a text, that a program of a card looks at …
LOOKED_TOGETHER = 1 << 22  # … and numbers that these find of answers' rows at once; a row has all of its own
SCORES_TOGETHER = 1 << 25  # of queries, that attention in torch has at once; a row has all of its own


class KvFormat(NamedTuple):
    """How K and V are stored. In a `scaled` format the numbers that one head has for one token share an f32 scale, one
    for K and one for V."""

    name: str
    itemsize: int
    scaled: bool = False


KV_FORMATS: Mapping[str, KvFormat] = {
    kind.name: kind
    for kind in (KvFormat("f32", 4), KvFormat("f16", 2), KvFormat("bf16", 2), KvFormat("i8", 1, scaled=True))
}


class KvLayout(NamedTuple):
    """Where the K and V of one head lie in a page, in bytes. First come the keys (head_dim, 64), then the values (64,
    `wide`), then for a scaled format the scales of the keys (64,) and of the values (64,), f32."""

    kind: KvFormat
    head_dim: int
    wide: int  # head_dim filled up with zeros to whole vectors
    values_at: int
    scales_at: int
    head_bytes: int

    @classmethod
    def of(cls, kind: KvFormat, head_dim: int) -> KvLayout:
        wide = -(-head_dim // VALUE_STEP) * VALUE_STEP
        values_at = PAGE_TOKENS * head_dim * kind.itemsize
        scales_at = values_at + PAGE_TOKENS * wide * kind.itemsize
        scales = 2 * PAGE_TOKENS * SCALE_BYTES if kind.scaled else 0
        return cls(kind, head_dim, wide, values_at, scales_at, scales_at + scales)


def lent_pages(context_tokens: int, chunk_tokens: int) -> int:
    """Of K and V of a layer, that the texts of a group have on a device for a moment, at most: a whole text's, and for
    all rows of prompts in a step."""
    return -(-(context_tokens + chunk_tokens) // PAGE_TOKENS)


def kv_page_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of a page: K and V of PAGE_TOKENS tokens in all layers. `dtype`: a key of KV_FORMATS."""
    return len(spec.layers) * spec.kv_heads * KvLayout.of(KV_FORMATS[dtype], spec.head_dim).head_bytes


def staged_starts(sizes: Sequence[int]) -> list[int]:
    """Where matrices of so many bytes begin in memory that they pass through, and where the last one's room ends."""
    return [*accumulate((-(-size // STAGED_STARTS) * STAGED_STARTS for size in sizes), initial=0)]


def staged_slot_bytes(nbytes: int) -> int:
    """Room there for the matrices of a block, whichever sizes they have."""
    return nbytes + MOST_MATRICES * STAGED_STARTS


def arena_slack(nbytes: int) -> int:
    """Bytes that memory for weights may waste because it is taken in huge pages."""
    return nbytes // 64
