"""What a home computes: the one set of functions that a transformer asks of wherever a block is computed.

A home is where a block is computed, e.g. the CPU. Hidden states stay in their home: only it knows what they are made
of, and everybody else hands them on untouched. Weights, norms, pages of KV, angles and ids are the host's arrays; a
home that needs them in another form keeps that in their `prepared`, under itself.

Letters in shapes: T rows, n numbers in a row.
"""

from collections.abc import Sequence
from typing import Protocol

from shoal.kernels.arrays import Floats, Hidden, Ids
from shoal.kernels.attention_operands import HeadNorms, KvPages, Rotation, Segments
from shoal.kernels.matrix import Activation, FeedForward, Linears, Routes
from shoal.kernels.routing import Routing


class ComputeHome(Protocol):
    """Hidden states (T, n) stand for f32. What a row of a result is must not depend on the rows beside it."""

    def place(self, rows: Floats) -> Hidden:
        """Rows (T, n) of the host as hidden states of this home."""
        ...

    def fetch(self, x: Hidden) -> Floats:
        """Hidden states (T, n) of this home as rows of the host."""
        ...

    def rows(self, x: Hidden, which: slice | Ids) -> Hidden:
        """Some rows of x: of a slice a view, which writes through to x; of ids int64 (R,) a copy."""
        ...

    def zeros_like(self, x: Hidden) -> Hidden: ...

    def add(self, x: Hidden, y: Hidden) -> None:
        """x += y, where x is."""
        ...

    def scale(self, x: Hidden, factor: float) -> Hidden:
        """x * factor"""
        ...

    def clip(self, x: Hidden, limit: float) -> None:
        """Bounds x to [-limit, limit], where x is."""
        ...

    def gate(self, x: Hidden, gates: Hidden) -> None:
        """x (T, n) *= sigmoid(gates (T, 1)), where x is."""
        ...

    def pad(self, x: Hidden, margins: tuple[int, int]) -> Hidden:
        """x (T, n) between so many zeros on its left and on its right."""
        ...

    def linears(self, x: Hidden, all: Linears, norm: Floats | None = None, eps: float = 0.0) -> list[Hidden]:
        """x @ w.T + bias for every matrix: x (T, cols), first normalised as `rms_norm` does if there is a norm
        (cols,); (T, rows) each.

        Quantised weights meet x rounded to 16 bits (`reference.quantised_inputs`); a NaN or infinity in a row of x
        makes that row of the result NaN.
        """
        ...

    def feed_forward(
        self,
        x: Hidden,
        layer: FeedForward,
        activation: Activation,
        norm: Floats | None = None,
        eps: float = 0.0,
    ) -> Hidden:
        """down(act(gate(x)) * up(x)): x (T, cols), first normalised if there is a norm; (T, rows of down)."""
        ...

    def experts(
        self, x: Hidden, all: Sequence[FeedForward], routes: Routes, activation: Activation, into: Hidden
    ) -> None:
        """For every token of x (T, cols) adds factor times `feed_forward` of the experts that take it to `into`
        (T, rows of down), one after the other: so experts may come in several calls. There is at least one expert,
        and all are of one shape."""
        ...

    def rms_norm(self, x: Hidden, weight: Floats, eps: float) -> Hidden:
        """x / rms(x) * weight row by row: x (T, n), weight (n,)."""
        ...

    def rms_norm_heads(self, x: Hidden, weight: Floats, eps: float) -> Hidden:
        """As `rms_norm`, of every head by itself: x (T, heads * head_dim), weight (head_dim,)."""
        ...

    def squares(self, parts: Sequence[Hidden], counted: Sequence[bool]) -> Hidden:
        """(T, len(parts)): the sum of the squares of each row of each part (T, n), or 0 for parts that do not count."""
        ...

    def normed_by(
        self, x: Hidden, weight: Floats, squares: Hidden, column: int, numbers: int, eps: float
    ) -> Hidden:
        """As `rms_norm`, of rows that are parts of longer ones: of `numbers` numbers, whose squares sum to a column of
        squares (T, m). x (T, n), weight (n,)."""
        ...

    def attention(
        self,
        kv: KvPages,
        segments: Segments,
        q: Hidden,
        k: Hidden,
        v: Hidden,
        *,
        rotation: Rotation,
        scale: float,
        window: int | None = None,
        norms: HeadNorms | None = None,
    ) -> Hidden:
        """Normalise and rotate q and k, store k and v in their pages, then attend: every row to its sequence up to
        itself.

        q (T, heads * head_dim); k, v (T, kv_heads * head_dim); head h uses K/V head h // (heads // kv_heads).
        With `window`, position p sees (p - window, p]. Returns (T, heads * head_dim). A row of the result does not
        depend on how its sequence was cut into steps, nor on the pages.
        """
        ...

    def route(self, scores: Hidden, count: int, normalize: bool) -> Routing:
        """Each row of scores (T, experts) goes to its `count` best, of equals the lowest; `routing.route`."""
        ...

    def likeliest(self, scores: Hidden, count: int) -> list[int]:
        """What the rows of scores (T, experts) choose, `count` each, by the sum of the odds that they give it."""
        ...


def carried(x: Hidden, source: ComputeHome, target: ComputeHome) -> Hidden:
    """Hidden states of `source` in `target`: the one place where they are copied between homes. x itself where these
    are one."""
    return x if source is target else target.place(source.fetch(x))
