"""A home like that of another device: its hidden states are handles that nobody else can compute with or look into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal.kernels.arrays import Floats, Ids
from shoal.kernels.attention_operands import KvPages, Scoring, Segments
from shoal.kernels.cpu_home import CpuHome
from shoal.kernels.matrix import FeedForward, Linears, Routes
from shoal.kernels.routing import Routing


class Opaque:
    """Hidden states of one home. It has no length, rows or arithmetic, and NumPy does not accept it."""

    __array_ufunc__ = None

    def __init__(self, home: OpaqueHome, array: Floats) -> None:
        self._home = home
        self._array = array

    def __array__(self, *_: object, **__: object) -> Floats:
        raise TypeError("hidden states of another home are no array")

    def __bool__(self) -> bool:
        raise TypeError("hidden states of another home are neither true nor false")


class OpaqueHome:
    """Computes what `cpu` computes, and counts the copies in and out."""

    def __init__(self, cpu: CpuHome) -> None:
        self._cpu = cpu
        self.placed = self.fetched = 0

    def _in(self, x: Opaque) -> Floats:
        assert x._home is self, "hidden states of another home"
        return x._array

    def _out(self, array: Floats) -> Opaque:
        return Opaque(self, array)

    def place(self, rows: Floats) -> Opaque:
        self.placed += 1
        return self._out(rows.copy())

    def fetch(self, x: Opaque) -> Floats:
        self.fetched += 1
        return self._in(x).copy()

    def prefetch(self, *all: Opaque) -> None:
        assert all
        for x in all:
            self._in(x)

    def rows(self, x: Opaque, which: slice | Ids) -> Opaque:
        return self._out(self._cpu.rows(self._in(x), which))

    def zeros_like(self, x: Opaque) -> Opaque:
        return self._out(self._cpu.zeros_like(self._in(x)))

    def add(self, x: Opaque, y: Opaque) -> None:
        self._cpu.add(self._in(x), self._in(y))

    def scale(self, x: Opaque, factor: float) -> Opaque:
        return self._out(self._cpu.scale(self._in(x), factor))

    def clip(self, x: Opaque, limit: float) -> None:
        self._cpu.clip(self._in(x), limit)

    def gate(self, x: Opaque, gates: Opaque) -> None:
        self._cpu.gate(self._in(x), self._in(gates))

    def pad(self, x: Opaque, margins: tuple[int, int]) -> Opaque:
        return self._out(self._cpu.pad(self._in(x), margins))

    def linears(self, x: Opaque, all: Linears, norm: Floats | None = None, eps: float = 0.0) -> list[Opaque]:
        return [self._out(y) for y in self._cpu.linears(self._in(x), all, norm, eps)]

    def feed_forward(
        self, x: Opaque, layer: FeedForward, norm: Floats | None = None, eps: float = 0.0
    ) -> Opaque:
        return self._out(self._cpu.feed_forward(self._in(x), layer, norm, eps))

    def experts(self, x: Opaque, all: Sequence[FeedForward], routes: Routes, into: Opaque) -> None:
        self._cpu.experts(self._in(x), all, routes, self._in(into))

    def scores(self, x: Opaque, router: Linears) -> Opaque:
        return self._out(self._cpu.scores(self._in(x), router))

    def rms_norm(self, x: Opaque, weight: Floats, eps: float) -> Opaque:
        return self._out(self._cpu.rms_norm(self._in(x), weight, eps))

    def rms_norm_heads(self, x: Opaque, weight: Floats, eps: float) -> Opaque:
        return self._out(self._cpu.rms_norm_heads(self._in(x), weight, eps))

    def squares(self, parts: Sequence[Opaque], counted: Sequence[bool]) -> Opaque:
        return self._out(self._cpu.squares([self._in(x) for x in parts], counted))

    def normed_by(self, x: Opaque, weight: Floats, squares: Opaque, *how: Any) -> Opaque:
        return self._out(self._cpu.normed_by(self._in(x), weight, self._in(squares), *how))

    def attention(
        self, kv: KvPages, segments: Segments, q: Opaque, k: Opaque, v: Opaque, scoring: Scoring
    ) -> Opaque:
        return self._out(self._cpu.attention(kv, segments, self._in(q), self._in(k), self._in(v), scoring))

    def route(self, scores: Opaque, count: int, normalize: bool) -> Routing:
        return self._cpu.route(self._in(scores), count, normalize)

    def likeliest(self, scores: Opaque, count: int) -> list[int]:
        return self._cpu.likeliest(self._in(scores), count)
