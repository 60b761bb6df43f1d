"""The CPU's home: hidden states are NumPy arrays, f32 (T, n).

Has what all kernels of the CPU share: small operations on hidden states, in NumPy, and the checks of operands. All
kernels agree with `reference` to float32 rounding, or with its `as_words` where bf16 weights become words: results do
not show which ones computed. With native kernels, moreover, no bit of a row depends on the rest of the batch or on
the number of threads.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Protocol

import numpy as np

from shoal.kernels import routing
from shoal.kernels.arrays import FLOAT32, Bytes, Floats, Ids
from shoal.kernels.attention_operands import KvPages, Scoring, Segments
from shoal.kernels.compute_home import HERE, ComputeHome, Staged
from shoal.kernels.errors import OperandError
from shoal.kernels.huge_pages import Arena
from shoal.kernels.matrix import FeedForward, Linears, Matrix, Routes
from shoal.kernels.types import WeightType


class CpuHome(ComputeHome, Protocol):
    """`ComputeHome` on NumPy arrays, which may lie any way in memory; only what `experts` adds to must be contiguous.
    OperandError for operands that do not fit together.

    Kernels derive from this. They check operands and compute what is left open here.
    """

    name: str

    def set_threads(self, n: int) -> None: ...

    # What is in the memory of a matrix is the same for all kernels; `stored_rows` checks these operands.
    def interleave(self, kind: WeightType, stored: Bytes, into: Bytes) -> None: ...
    def gather_rows(self, w: Matrix, ids: Ids) -> Floats: ...
    def dequantize(self, w: Matrix) -> Floats: ...

    def keep_matrix(self, w: Matrix) -> Matrix:
        return w

    def keep_vector(self, x: Floats) -> Floats:
        return x

    def exchange(self, mine: Matrix, hosts: Matrix) -> None:
        mine.data[...], hosts.data[...] = hosts.data.copy(), mine.data.copy()

    def staging(self, nbytes: int) -> Bytes:
        return np.empty(0, np.uint8)  # weights are here

    def staged(self, its: Staged) -> Matrix:
        return its.matrix

    def stage(self, all: Sequence[Staged], lent: AbstractContextManager[object] = HERE) -> None:
        return  # weights are here

    def lock(self, all: Sequence[Bytes]) -> None:
        return  # weights are here

    def settle(self) -> None:
        return

    def pages(self, shape: tuple[int, int, int, int]) -> Bytes:
        return Arena().take(prod(shape)).reshape(shape)

    def layer_of(self, pages: Bytes, place: int) -> Bytes:
        layer: Bytes = pages[:, place]
        return layer

    def copy_page(self, pages: Bytes, source: int, target: int) -> None:
        pages[target] = pages[source]

    def page_out(self, pages: Bytes, number: int) -> Bytes:
        page: Bytes = pages[number]
        return page

    def page_in(self, pages: Bytes, number: int, page: Bytes) -> None:
        if not np.may_share_memory(page, pages):  # what `page_out` gave is there already
            pages[number] = page

    def lent_pages(self, shape: tuple[int, int, int]) -> Bytes:
        return np.empty(shape, np.uint8)

    def pages_in(self, pages: Bytes, sources: Sequence[Bytes]) -> None:
        for page, source in zip(pages, sources, strict=False):
            page[...] = source

    def place(self, rows: Floats) -> Floats:
        return rows

    def fetch(self, x: Floats) -> Floats:
        return x

    def prefetch(self, *all: Floats) -> None:
        return  # they are here

    def rows(self, x: Floats, which: slice | Ids) -> Floats:
        return x[which]

    def zeros_like(self, x: Floats) -> Floats:
        return np.zeros(x.shape, np.float32)

    def add(self, x: Floats, y: Floats) -> None:
        x += y

    def scale(self, x: Floats, factor: float) -> Floats:
        return x * factor

    def clip(self, x: Floats, limit: float) -> None:
        x.clip(-limit, limit, out=x)

    def gate(self, x: Floats, gates: Floats) -> None:
        with np.errstate(over="ignore"):
            x /= (1 + np.exp(-gates, dtype=np.float64)).astype(np.float32)

    def pad(self, x: Floats, margins: tuple[int, int]) -> Floats:
        return np.pad(x, ((0, 0), margins))

    def rms_norm_heads(self, x: Floats, weight: Floats, eps: float) -> Floats:
        normed: Floats = self.rms_norm(x.reshape(-1, len(weight)), weight, eps)
        return normed.reshape(x.shape)

    def squares(self, parts: Sequence[Floats], counted: Sequence[bool]) -> Floats:
        # In f64, rounded at the end: f32's last bit may depend on how many rows there are.
        found = np.zeros((len(parts[0]), len(parts)), np.float32)
        for column, (x, counts) in enumerate(zip(parts, counted, strict=True)):
            if counts:
                found[:, column] = np.square(x, dtype=np.float64).sum(1)
        return found

    def normed_by(
        self, x: Floats, weight: Floats, squares: Floats, column: int, numbers: int, eps: float
    ) -> Floats:
        mean = squares[:, column : column + 1].astype(np.float64) / numbers
        normed: Floats = x * (1 / np.sqrt(mean + eps)).astype(np.float32) * weight
        return normed

    def route(self, scores: Floats, count: int, normalize: bool) -> routing.Routing:
        check_route(scores, count)
        return routing.route(scores, count, normalize)

    def likeliest(self, scores: Floats, count: int) -> list[int]:
        return routing.likeliest(scores, count)


def check_linears(x: Floats, all: Linears, norm: Floats | None = None) -> None:
    if x.dtype != FLOAT32 or x.ndim != 2 or x.shape[1] != all.cols:
        raise OperandError(
            f"the input of a linear must be float32 of shape (T, {all.cols}), got {x.dtype} {x.shape}"
        )
    if norm is not None and (norm.dtype != FLOAT32 or norm.shape != (all.cols,)):
        raise OperandError(f"a norm must be float32 of shape ({all.cols},), got {norm.dtype} {norm.shape}")


def check_experts(x: Floats, all: Sequence[FeedForward], routes: Routes, into: Floats) -> None:
    check_linears(x, all[0].enter)
    form = all[0].form
    shape = (len(x), form.rows)
    if into.dtype != FLOAT32 or into.shape != shape or not into.flags.carray:
        raise OperandError(
            f"experts add to contiguous float32 of shape {shape}, got {into.dtype} {into.shape}"
        )
    if [layer for layer in all if layer.form != form]:
        raise OperandError("experts of different shapes or activations cannot be computed together")
    starts, tokens, factors = routes.starts, routes.tokens, routes.factors
    if tokens.dtype != np.int64 or factors.dtype != FLOAT32 or tokens.shape != factors.shape:
        raise OperandError(
            f"routes need int64 tokens and float32 factors, got {tokens.dtype} and {factors.dtype}"
        )
    whole = len(starts) == len(all) + 1 and starts[0] == 0 and starts[-1] == len(tokens)
    if not whole or sorted(starts) != list(starts):
        raise OperandError(
            f"routes that start at {starts} do not share {len(tokens)} out among {len(all)} experts"
        )


def check_route(scores: Floats, count: int) -> None:
    if scores.dtype != FLOAT32 or scores.ndim != 2 or not 1 <= count <= scores.shape[1]:
        raise OperandError(
            f"rows go to {count} of the experts that float32 (T, experts) scores, got {scores.dtype} {scores.shape}"
        )


def check_norm(x: Floats, weight: Floats) -> None:
    if x.dtype != FLOAT32 or x.ndim != 2 or weight.dtype != FLOAT32 or weight.shape != x.shape[1:]:
        raise OperandError(
            f"a norm takes float32 (T, d) and (d,), got {x.dtype} {x.shape} and {weight.dtype} {weight.shape}"
        )


def check_attention(
    kv: KvPages, segments: Segments, q: Floats, k: Floats, v: Floats, scoring: Scoring
) -> None:
    rotation, _, window, norms = scoring
    tokens, dim = segments.tokens, kv.layout.head_dim
    wide, narrow = (tokens, kv.heads * dim), (tokens, kv.kv_heads * dim)
    if q.shape != wide or k.shape != narrow or v.shape != narrow:
        raise OperandError(
            f"{tokens} rows of {kv.heads} heads and {kv.kv_heads} K/V heads of {dim} are q {wide} and "
            f"k, v {narrow}, got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.dtype != FLOAT32 or k.dtype != FLOAT32 or v.dtype != FLOAT32:
        raise OperandError(f"q, k and v must be float32, got {q.dtype}, {k.dtype}, {v.dtype}")
    if segments.most_page >= kv.pages:
        raise OperandError(f"there is no page {segments.most_page}: there are {kv.pages}")
    if rotation.dims > dim or len(rotation.cos) != tokens:
        raise OperandError(
            f"angles of {len(rotation.cos)} rows and {rotation.dims} dimensions for {tokens} rows of heads of {dim}"
        )
    if window is not None and window < 1:
        raise OperandError(f"window={window}: must be at least 1, or none")
    for weight in norms[:2] if norms else ():
        if weight.dtype != FLOAT32 or weight.shape != (dim,):
            raise OperandError(
                f"norms of heads must be float32 of shape ({dim},), got {weight.dtype} {weight.shape}"
            )
