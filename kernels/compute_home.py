"""What a transformer asks of the home that computes a block, e.g. the CPU: one set of functions for every home.

Hidden states stay in their home. Only the home knows what they are made of; everybody else hands them on untouched.
Weights, norms and pages of KV are in their home's memory: `keep_matrix`, `keep_vector` and `pages` bring them there.
Angles, ids and routes are arrays of the host. A home that needs operands in another form keeps that form in their
`prepared`, under itself.

Letters in shapes: T rows, n numbers in a row.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

from shoal.kernels.arrays import Bytes, Floats, Hidden, Ids
from shoal.kernels.attention_operands import KvPages, Scoring, Segments
from shoal.kernels.matrix import FeedForward, Linears, Matrix, Routes
from shoal.kernels.routing import Routing

HERE: AbstractContextManager[object] = nullcontext()  # what does not have to come first


class Staged(NamedTuple):
    """Weights of the host, and the memory of another home that they come to, from byte `start` of it on."""

    matrix: Matrix
    staging: Bytes
    start: int


class Locked(Protocol):
    """Memory of the host that is page-locked for a home, `nbytes` of it, until `release`; `trouble`: why that is not
    all, in one line."""

    nbytes: int
    trouble: str

    def release(self) -> None:
        """Idempotent."""
        ...


class HomeMemory(Protocol):
    """What stays in a home from step to step. Nobody but the home looks into what these functions return. They raise
    HomeFull where there is no room for it, and HomeLost."""

    def keep_matrix(self, w: Matrix) -> Matrix:
        """The same weights in this home's memory; those of the host are not needed any more."""
        ...

    def keep_vector(self, x: Floats) -> Floats:
        """The same numbers in this home's memory: norms, biases."""
        ...

    def exchange(self, mine: Matrix, hosts: Matrix) -> None:
        """The weights of two matrices of one form change places: one in this home's memory and one in the host's. No
        step may be under way."""
        ...

    def staging(self, nbytes: int) -> Bytes:
        """Memory for weights that come and go, uint8 (nbytes,)."""
        ...

    def staged(self, its: Staged) -> Matrix:
        """The weights where they come to, as kernels take them: those that were staged there last."""
        ...

    def stage(self, all: Sequence[Staged], lent: AbstractContextManager[object] = HERE) -> None:
        """Begin to bring these weights, in one go, as soon as nothing that was in their memory is computed with any
        more. Until a step that uses them has ended, nobody may change them on the host; where they are `lent`, they are
        there, and may not be changed, from when that was entered until it is left, once, by any thread. What entering
        raises is raised by whoever computes with the weights."""
        ...

    def lock(self, all: Sequence[Bytes]) -> Locked | None:
        """Page-lock weights of the host where they lie, as far as the system lets: they are to be staged again and
        again. None where that is of no use."""
        ...

    def settle(self) -> None:
        """Wait for all that is staged: nothing of the host is looked at for it any more, also where the home is lost.
        Raises nothing of what went wrong with it."""
        ...

    def pages(self, shape: tuple[int, int, int, int]) -> Bytes:
        """Zeros for K and V, uint8 (pages, layers, kv_heads, head_bytes)."""
        ...

    def layer_of(self, pages: Bytes, place: int) -> Bytes:
        """A view of one of their layers, (pages, kv_heads, head_bytes), for `KvPages`."""
        ...

    def copy_page(self, pages: Bytes, source: int, target: int) -> None: ...

    def page_out(self, pages: Bytes, number: int) -> Bytes:
        """One page on the host, (layers, kv_heads, head_bytes): where pages are on the host a view, else a copy."""
        ...

    def page_in(self, pages: Bytes, number: int, page: Bytes) -> None:
        """One page from the host, (layers, kv_heads, head_bytes)."""
        ...


class ComputeHome(HomeMemory, Protocol):
    """Hidden states (T, n) stand for f32. A row of a result must not depend on the rows beside it. Where
    a home is no part of the process, any of these functions raises HomeFull or HomeLost."""

    def place(self, rows: Floats) -> Hidden:
        """Rows (T, n) of the host as hidden states of this home. Nobody may change the rows until something that was
        computed from them has been fetched."""
        ...

    def fetch(self, x: Hidden) -> Floats:
        """Hidden states (T, n) of this home as rows of the host."""
        ...

    def prefetch(self, *all: Hidden) -> None:
        """These will be fetched, or routed by. Begins to bring them to the host, in one copy, beside what is computed
        next. Nobody may change them before they have been fetched."""
        ...

    def rows(self, x: Hidden, which: slice | Ids) -> Hidden:
        """Some rows of x: for a slice a view, so that writing to it writes to x; for ids int64 (R,) a copy."""
        ...

    def zeros_like(self, x: Hidden) -> Hidden: ...

    def add(self, x: Hidden, y: Hidden) -> None:
        """x += y, in place."""
        ...

    def scale(self, x: Hidden, factor: float) -> Hidden:
        """x * factor"""
        ...

    def clip(self, x: Hidden, limit: float) -> None:
        """Bounds x to [-limit, limit], in place."""
        ...

    def gate(self, x: Hidden, gates: Hidden) -> None:
        """x (T, n) *= sigmoid(gates (T, 1)), in place."""
        ...

    def pad(self, x: Hidden, margins: tuple[int, int]) -> Hidden:
        """x (T, n) with `margins` zeros added on its left and on its right."""
        ...

    def linears(self, x: Hidden, all: Linears, norm: Floats | None = None, eps: float = 0.0) -> list[Hidden]:
        """x @ w.T + bias for every matrix, (T, rows) each. x (T, cols) is normalised first, as by `rms_norm`, if a norm
        (cols,) is given.

        Quantised weights are multiplied by x rounded to `all.input_bits` (`reference.quantised_inputs`). If a row of x
        has a NaN or an infinity, that row of the result is NaN.
        """
        ...

    def feed_forward(
        self, x: Hidden, layer: FeedForward, norm: Floats | None = None, eps: float = 0.0
    ) -> Hidden:
        """down(act(gate(x)) * up(x)), (T, rows of down). x (T, cols) is normalised first if a norm is given."""
        ...

    def experts(self, x: Hidden, all: Sequence[FeedForward], routes: Routes, into: Hidden) -> None:
        """For every token of x (T, cols) adds factor times `feed_forward` of each of its experts to `into` (T, rows of
        down), in the order of `all`, so that experts may be spread over several calls. There is at least one expert,
        and all have one shape and activation."""
        ...

    def rms_norm(self, x: Hidden, weight: Floats, eps: float) -> Hidden:
        """x / rms(x) * weight, row by row: x (T, n), weight (n,). Every home that may be one of a
        group's gives the same bits (`fixed_order`)."""
        ...

    def rms_norm_heads(self, x: Hidden, weight: Floats, eps: float) -> Hidden:
        """`rms_norm` of every head by itself: x (T, heads * head_dim), weight (head_dim,)."""
        ...

    def squares(self, parts: Sequence[Hidden], counted: Sequence[bool]) -> Hidden:
        """(T, len(parts)): the sum of the squares of each row of each part (T, n); 0 for parts that are not counted."""
        ...

    def normed_by(
        self, x: Hidden, weight: Floats, squares: Hidden, column: int, numbers: int, eps: float
    ) -> Hidden:
        """`rms_norm` of rows that are parts of longer rows: x (T, n), weight (n,). The longer rows have `numbers`
        numbers, and the sums of their squares are a column of `squares` (T, m)."""
        ...

    def attention(
        self, kv: KvPages, segments: Segments, q: Hidden, k: Hidden, v: Hidden, scoring: Scoring
    ) -> Hidden:
        """Normalises and rotates q and k, stores k and v in their pages, then lets every row attend to its sequence up
        to its own position; (T, heads * head_dim).

        q (T, heads * head_dim); k, v (T, kv_heads * head_dim); head h uses K/V head h // (heads // kv_heads). A row of
        the result depends neither on how its sequence was cut into steps nor on the choice of pages.
        """
        ...

    def lent_pages(self, shape: tuple[int, int, int]) -> Bytes:
        """K and V of one layer for a moment, uint8 (pages, kv_heads, head_bytes), for `KvPages`, with anything in them.
        `rows` of them can be fetched."""
        ...

    def pages_in(self, pages: Bytes, sources: Sequence[Bytes]) -> None:
        """Begin to bring pages (kv_heads, head_bytes) of the host into the first of those that were lent. Nobody may
        change them there until something that was computed with them has been fetched."""
        ...

    def scores(self, x: Hidden, router: Linears) -> Hidden:
        """x @ w.T + bias of a router's one matrix, (T, rows). Every home that may be one of a group's gives the same
        bits (`fixed_order`), so that all ranks choose the same experts. Inputs of quantised weights are not rounded."""
        ...

    def route(self, scores: Hidden, count: int, normalize: bool) -> Routing:
        """As `routing.route`, of scores (T, experts)."""
        ...

    def likeliest(self, scores: Hidden, count: int) -> list[int]:
        """As `routing.likeliest`, of scores (T, experts)."""
        ...


def carried(x: Hidden, source: ComputeHome, target: ComputeHome) -> Hidden:
    """Hidden states of `source` as hidden states of `target`; x itself if both are the same home. Nothing else copies
    hidden states between homes."""
    return x if source is target else target.place(source.fetch(x))
