"""The operands of attention over pages of K and V (`ComputeHome.attention`).

Knows how K and V lie in a page and which rows of a step belong to which sequence. The caller decides which pages a
sequence has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from shoal.kernels.arrays import FLOAT32, Array, Bytes, Floats
from shoal.kernels.errors import OperandError, UnsupportedTypeError
from shoal.partition.memory_layout import KV_FORMATS, PAGE_TOKENS, KvLayout


def kv_layout(type: str, head_dim: int) -> KvLayout:
    """Where K and V of one head lie in a page; UnsupportedTypeError for a type that is not in KV_FORMATS."""
    if type not in KV_FORMATS:
        raise UnsupportedTypeError(f"KV of type {type!r} is not supported: use {', '.join(KV_FORMATS)}")
    return KvLayout.of(KV_FORMATS[type], head_dim)


@dataclass(eq=False)
class KvPages:
    """K and V of one layer, to which `heads` query heads attend: `data` uint8 (pages, kv_heads, head_bytes).

    There may be gaps between pages but none within a page. OperandError if sizes or memory do not fit.
    """

    layout: KvLayout
    heads: int
    data: Bytes
    pages: int = field(init=False)
    kv_heads: int = field(init=False)
    prepared: dict[object, Any] = field(default_factory=dict, init=False, repr=False)  # by home

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

    `table` int32 (S, 4) has for each sequence its first row, its number of rows, the position of the first row, and
    where its pages begin in `pages` int32 (N,). Position p is in the (p // 64)-th of them. The rows of a sequence
    follow those of the sequence before, from 0 on.
    """

    table: Array
    pages: Array
    tokens: int
    most_page: int
    prepared: dict[object, Any] = field(default_factory=dict, init=False, repr=False)  # by home

    @classmethod
    def build(cls, segments: Iterable[tuple[int, int, Sequence[int]]]) -> Segments:
        """From (rows, position of the first row, pages) of each sequence. OperandError if it has fewer pages than it
        needs; it may have more."""
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
    """The angles by which a step's rows turn the first `dims` numbers of a head: cos and sin f32 (T, dims / 2),
    contiguous. The numbers turn in pairs: (2i, 2i + 1) if `interleaved`, else (i, i + dims / 2).
    """

    dims: int
    interleaved: bool
    cos: Floats
    sin: Floats
    prepared: dict[object, Any] = field(default_factory=dict, init=False, repr=False)  # by home

    def __post_init__(self) -> None:
        for x in (self.cos, self.sin):
            rows = self.cos.shape[0]
            if x.dtype != FLOAT32 or x.shape != (rows, self.dims // 2) or not x.flags.c_contiguous:
                raise OperandError(
                    f"angles of {rows} rows and {self.dims} dimensions must be contiguous float32, "
                    f"got {x.dtype} {x.shape} with strides {x.strides}"
                )


class HeadNorms(NamedTuple):
    """RMS norms of every head before it is rotated: weights f32 (head_dim,) for q and for k."""

    q: Floats
    k: Floats
    eps: float


class Scoring(NamedTuple):
    """How a layer turns q and k into scores: normalised if there are norms, rotated, multiplied by `scale`. With a
    window, position p sees only (p - window, p]."""

    rotation: Rotation
    scale: float
    window: int | None = None
    norms: HeadNorms | None = None
