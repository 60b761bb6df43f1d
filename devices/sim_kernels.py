"""What the simulated device computes: the CPU's kernels, on what is inside of its handles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.kernels.arrays import Bytes, Floats, Ids
from shoal.kernels.attention_operands import KvPages, Rotation, Scoring, Segments
from shoal.kernels.cpu_home import CpuHome
from shoal.kernels.matrix import FeedForward, Linears, Matrix, Routes


class SimKernels:
    """Is an OnDevice."""

    name = "cpu"
    scratch_bytes, gathers = 0, False  # they take memory of the host

    def __init__(self, cpu: CpuHome) -> None:
        self._cpu = cpu
        self.add, self.scale, self.clip, self.gate, self.pad = cpu.add, cpu.scale, cpu.clip, cpu.gate, cpu.pad
        self.squares, self.normed_by = cpu.squares, cpu.normed_by
        self.zeros_like, self.rms_norm, self.rms_norm_heads = cpu.zeros_like, cpu.rms_norm, cpu.rms_norm_heads

    def laid_out(self, w: Matrix) -> Bytes:
        return w.data

    def put_back(self, laid_out: Bytes, w: Matrix) -> None:
        w.data[...] = laid_out

    def as_they_lie(self, bytes: Bytes, w: Matrix) -> Bytes:
        return bytes

    def clear(self, x: Bytes) -> None:
        x.fill(0)

    def copy(self, source: Bytes, target: Bytes) -> None:
        target[...] = source

    def part(self, x: Any, index: Any) -> Any:
        return x[index]

    def picked(self, x: Floats, ids: Ids) -> Floats:
        return x[ids]

    def joined(self, all: Sequence[Floats]) -> Floats:
        return np.concatenate([x.reshape(-1) for x in all])

    def linears(self, x: Floats, all: Linears, norm: Floats | None, eps: float) -> list[Floats]:
        return [*self._cpu.linears(x, self._linears(all), norm, eps)]

    def feed_forward(self, x: Floats, layer: FeedForward, norm: Floats | None, eps: float) -> Any:
        return self._cpu.feed_forward(x, self._feed_forward(layer), norm, eps)

    def experts(self, x: Floats, all: Sequence[FeedForward], routes: Routes, into: Floats) -> None:
        tokens, factors = routes.tokens.inside, routes.factors.inside  # type: ignore[attr-defined]
        layers = [self._feed_forward(layer) for layer in all]
        self._cpu.experts(x, layers, Routes(routes.starts, tokens, factors), into)

    def scores(self, x: Floats, router: Linears) -> Any:
        return self._cpu.scores(x, self._linears(router))

    def attention(
        self, kv: KvPages, segments: Segments, places: Ids, q: Floats, k: Floats, v: Floats, scoring: Scoring
    ) -> Any:
        pages = kv.prepared.get(self)
        if pages is None:
            pages = kv.prepared[self] = replace(kv, data=kv.data.inside)  # type: ignore[attr-defined]
        rows = segments.prepared.get(self)
        if rows is None:
            rows = segments.prepared[self] = replace(segments, pages=places[: len(segments.pages)])
        turning = scoring.rotation.prepared.get(self) or self._rotation(scoring.rotation)
        return self._cpu.attention(pages, rows, q, k, v, scoring._replace(rotation=turning))

    def _rotation(self, rotation: Rotation) -> Rotation:
        cos, sin = rotation.cos.inside, rotation.sin.inside  # type: ignore[attr-defined]
        there = rotation.prepared[self] = replace(rotation, cos=cos, sin=sin)
        return there

    def _linears(self, all: Linears) -> Linears:
        there: Linears | None = all.prepared.get(self)
        if there is None:
            matrices = [Matrix(w.type, w.data.inside, w.rows, w.cols) for w in all.matrices]  # type: ignore[attr-defined]
            biases = [bias if bias is None else bias.inside for bias in all.biases]  # type: ignore[attr-defined]
            there = all.prepared[self] = Linears(matrices, biases, all.input_bits)
        return there

    def _feed_forward(self, layer: FeedForward) -> FeedForward:
        there: FeedForward | None = layer.prepared.get(self)
        if there is None:
            enter, leave = self._linears(layer.enter), self._linears(layer.leave)
            there = layer.prepared[self] = FeedForward(enter, leave, layer.form.activation)
        return there
