"""What attention over pages of K and V is given.

Knows how K and V lie in a page and which rows of a step belong to which sequence. Which pages are whose is the caller's
business; the call is `dispatch.attention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from shoal.kernels.arrays import Array, Bytes, Floats
from shoal.kernels.errors import OperandError, UnsupportedTypeError

PAGE_TOKENS = 64

_F32 = np.dtype(np.float32)


class KvType(NamedTuple):
    """How K and V are stored. Numbers of a `scaled` type share an f32 scale per token, head, and K or V."""

    name: str
    id: int
    itemsize: int
    scaled: bool = False


KV_TYPES = {
    kind.name: kind
    for kind in (
        KvType("f32", 0, 4),
        KvType("f16", 1, 2),
        KvType("bf16", 2, 2),
        KvType("i8", 3, 1, scaled=True),
    )
}


class KvLayout(NamedTuple):
    """Where the K and V of one head lie in a page, in bytes: keys (head_dim, 64), values (64, `wide`), for a scaled
    type the scales of keys (64,) and of values (64,) in f32."""

    kind: KvType
    head_dim: int
    wide: int  # head_dim filled up with zeros to whole vectors
    values_at: int
    scales_at: int
    head_bytes: int

    @classmethod
    def of(cls, type: str, head_dim: int) -> KvLayout:
        """UnsupportedTypeError for a type there is not."""
        if type not in KV_TYPES:
            raise UnsupportedTypeError(f"KV of type {type!r} is not supported: use {', '.join(KV_TYPES)}")
        kind = KV_TYPES[type]
        wide = -(-head_dim // 16) * 16
        values_at = PAGE_TOKENS * head_dim * kind.itemsize
        scales_at = values_at + PAGE_TOKENS * wide * kind.itemsize
        return cls(kind, head_dim, wide, values_at, scales_at, scales_at + 8 * PAGE_TOKENS * kind.scaled)


@dataclass(eq=False)
class KvPages:
    """K and V of one layer: `data` uint8 (pages, kv_heads, head_bytes), looked at by `heads` query heads.

    Pages may lie any distance apart, what is in a page lies together. OperandError where this does not fit.
    """

    layout: KvLayout
    heads: int
    data: Bytes
    pages: int = field(init=False)
    kv_heads: int = field(init=False)
    prepared: object = field(default=None, init=False, repr=False)  # the native home's

    def __post_init__(self) -> None:
        self.pages, self.kv_heads, head_bytes = self.data.shape
        strides = (self.layout.head_bytes, 1)
        if self.data.dtype != np.uint8 or head_bytes != self.layout.head_bytes or self.heads % self.kv_heads:
            raise OperandError(
                f"{self.heads} heads do not look at pages of {self.kv_heads} heads of {head_bytes} bytes: heads "
                f"must be a multiple, the bytes must be {self.layout.head_bytes}"
            )
        if self.data.strides[1:] != strides or self.data.strides[0] < self.kv_heads * head_bytes:
            raise OperandError(f"a page must lie together, got strides {self.data.strides}")
        if not self.data.flags.writeable:
            raise OperandError("pages are written to, so their memory must not be read-only")


@dataclass(eq=False)
class Segments:
    """Which rows of a step are which positions of which sequence. Built once per step, for every layer.

    `table` int32 (S, 4): first row, number of rows, position of the first row, and where in `pages` int32 (N,) the
    pages of the sequence begin: position p is in the (p // 64)-th. Rows of segments follow each other from 0 on.
    """

    table: Array
    pages: Array
    tokens: int
    most_page: int
    prepared: object = field(default=None, init=False, repr=False)  # the native home's

    @classmethod
    def build(cls, segments: Iterable[tuple[int, int, Sequence[int]]]) -> Segments:
        """From (rows, position of the first, pages) per sequence; there may be more pages than needed, not fewer."""
        table: list[tuple[int, int, int, int]] = []
        used: list[int] = []
        tokens = 0
        for rows, start, pages in segments:
            needed = -(-(start + rows) // PAGE_TOKENS)
            if rows < 1 or start < 0 or len(pages) < needed:
                raise OperandError(
                    f"positions [{start}, {start + rows}) need {needed} pages and at least one row, "
                    f"got {len(pages)} pages"
                )
            table.append((tokens, rows, start, len(used)))
            used += pages[:needed]
            tokens += rows
        if used and min(used) < 0:
            raise OperandError(f"there is no page {min(used)}")
        numbers = np.array(table, np.int32).reshape(-1, 4)
        return cls(numbers, np.array(used, np.int32), tokens, max(used, default=-1))


@dataclass(eq=False)
class Rotation:
    """Angles of a step's positions for the first `dims` numbers of a head: cos and sin f32 (T, dims / 2), contiguous.

    Pairs are (2i, 2i + 1) if `interleaved`, else (i, i + dims / 2).
    """

    dims: int
    interleaved: bool
    cos: Floats
    sin: Floats
    prepared: object = field(default=None, init=False, repr=False)  # the native home's

    def __post_init__(self) -> None:
        for x in (self.cos, self.sin):
            if x.dtype != _F32 or x.shape != (len(self.cos), self.dims // 2) or not x.flags.c_contiguous:
                raise OperandError(
                    f"angles of {len(self.cos)} rows and {self.dims} dimensions must be contiguous float32, "
                    f"got {x.dtype} {x.shape} with strides {x.strides}"
                )


class HeadNorms(NamedTuple):
    """RMS norms of every head before it is rotated: weights f32 (head_dim,) of q and of k."""

    q: Floats
    k: Floats
    eps: float
