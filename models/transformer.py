"""One transformer for every family: what each kind of block computes.

Knows the arithmetic, top to bottom; the differences of a family are data in its `ModelSpec`. Holds no weights
and no KV: both are handed in per block, so the same code serves resident, streamed and sharded weights. What a
block returns is a *partial*: on several ranks the partials are summed before `leave` and the residual add.

Letters in shapes: T tokens of the step, H heads, K kv_heads, D head_dim, C hidden, F ffn columns.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from shoal.kernels import Routes, experts, feed_forward, linears, rms_norm
from shoal.kernels.arrays import Floats, Ids
from shoal.kernels.attention_operands import HeadNorms, KvPages, Rotation, Segments
from shoal.kernels.dispatch import attention
from shoal.partition.spec import ModelSpec

from .rope import Rope
from .step import Part
from .weights import Weights

Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Routing:
    """Which tokens go to which experts: `used` are those chosen by any token, ascending, `routes` their tokens."""

    used: list[int]
    routes: Routes

    def among(self, experts: Collection[int]) -> Routing:
        """Of these experts only: a run of those in use, as far as they are."""
        if len(experts) >= len(self.used) and all(map(experts.__contains__, self.used)):
            return self
        first, last = bisect_left(self.used, min(experts)), bisect_right(self.used, max(experts))
        starts = self.routes.starts[first : last + 1]
        mine = slice(starts[0], starts[-1])
        routes = Routes(
            tuple(start - starts[0] for start in starts), self.routes.tokens[mine], self.routes.factors[mine]
        )
        return Routing(self.used[first:last], routes)

    @classmethod
    def of(cls, experts: Ids, factors: Floats) -> Routing:
        """Row i of `experts` (T, k) are the choices of token i, with the factors `factors` (T, k)."""
        # Numbers this small are sorted in linear time.
        pairs = np.argsort(experts.astype(np.uint16), axis=None, kind="stable")
        counts = np.bincount(experts.reshape(-1))
        used = np.flatnonzero(counts)
        starts = tuple(accumulate(counts[used].tolist(), initial=0))
        return cls(used.tolist(), Routes(starts, pairs // experts.shape[1], factors.reshape(-1)[pairs]))


class Transformer:
    """Computes the blocks of one spec."""

    def __init__(self, spec: ModelSpec, context_tokens: int) -> None:
        self.spec = spec
        self._ropes = [Rope(rope, context_tokens) for rope in spec.ropes]

    def rotations(self, part: Part) -> list[Rotation]:
        """cos/sin of a part's positions, one per rope of the spec; computed once, used by every layer."""
        return [rope.at(part.positions) for rope in self._ropes]

    def embed(self, rows: Floats) -> Floats:
        """Rows of the embedding (T, C) → hidden (T, C)"""
        return rows * self.spec.embed_scale if self.spec.embed_scale != 1.0 else rows

    def attend(
        self,
        layer: int,
        weights: Weights,
        hidden: Floats,
        segments: Segments,
        rotations: list[Rotation],
        kv: KvPages,
    ) -> Floats:
        """hidden (T, C) → partial (T, C); the new K and V are stored in `kv`, the layer's pages."""
        spec, vector = self.spec, weights.vector
        q, k, v = linears(  # (T, H*D), (T, K*D) twice
            hidden, weights.linears("q", "k", "v"), self._pre_norm(weights), spec.norm_eps
        )
        norms = None
        if spec.qk_norm == "head" and spec.qkv_clip is None:
            norms = HeadNorms(vector["q_norm"], vector["k_norm"], spec.norm_eps)
        elif spec.qk_norm != "none":  # over rows of one head or of all heads, as long as the norm's weight
            q = self._normed(q.reshape(-1, len(vector["q_norm"])), vector["q_norm"]).reshape(q.shape)
            k = self._normed(k.reshape(-1, len(vector["k_norm"])), vector["k_norm"]).reshape(k.shape)
        if spec.qkv_clip is not None:
            q, k, v = (x.clip(-spec.qkv_clip, spec.qkv_clip, out=x) for x in (q, k, v))
        kind = spec.layers[layer]
        mixed = attention(
            kv,
            segments,
            q,
            k,
            v,
            rotation=rotations[kind.rope],
            scale=spec.attention_scale,
            window=kind.window,
            norms=norms,
        )  # (T, H*D)
        if any(spec.o_margins):  # columns of a shard's o that meet heads of others
            mixed = np.pad(mixed, ((0, 0), spec.o_margins))
        return linears(mixed, weights.linears("o"))[0]

    def feed_forward(self, weights: Weights, hidden: Floats) -> Floats:
        """Dense block: hidden (T, C) → partial (T, C)."""
        spec = self.spec
        return feed_forward(
            hidden, weights.feed_forward(), spec.activation, self._pre_norm(weights), spec.norm_eps
        )

    def foresee(self, weights: Weights, hidden: Floats) -> list[int]:
        """Which experts this router will choose if hidden (T, C), of an earlier layer, changes little until then, those
        of the highest odds first. That it does change little: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts
        Language Models with Offloading", 2023, section 3.2."""
        moe, norm = self.spec.moe, self._pre_norm(weights)
        assert moe is not None
        x = hidden if norm is None else self._normed(hidden, norm)
        return _likeliest(linears(x, weights.linears("router"))[0], moe.active)

    def route(self, weights: Weights, hidden: Floats) -> tuple[Floats, Routing, Floats | None]:
        """MoE router block: hidden (T, C) → normed x (T, C), routing, and the shared expert's partial (T, C) if there
        is one."""
        spec, moe, norm = self.spec, self.spec.moe, self._pre_norm(weights)
        assert moe is not None
        x = hidden if norm is None else self._normed(hidden, norm)
        scores = linears(x, weights.linears("router"))[0]  # (T, experts)
        chosen, behind = _best(scores, moe.active)
        # In f64, rounded at the end: f32's last bit may depend on how many rows there are.
        odds = np.exp(-behind)
        taken = np.take_along_axis(odds, chosen, -1)  # (T, k)
        factors = taken / (taken if moe.normalize else odds).sum(-1, keepdims=True)
        routing = Routing.of(chosen, factors.astype(np.float32))
        if not moe.shared_ffn:
            return x, routing, None
        shared = feed_forward(x, weights.feed_forward("shared_"), spec.activation)
        if moe.shared_gated:
            gate = linears(x, weights.linears("shared_scale"))[0]  # (T, 1)
            with np.errstate(over="ignore"):
                shared /= (1 + np.exp(-gate, dtype=np.float64)).astype(np.float32)
        return x, routing, shared

    def mix(self, weights: Mapping[int, Weights], x: Floats, routing: Routing, partial: Floats) -> None:
        """Adds what these experts make of their tokens, ascending, to partial (T, C); normed x (T, C). `weights`: all
        experts, or a run of those in use."""
        routing = routing.among(weights)
        if routing.used:
            layers = [weights[expert].feed_forward() for expert in routing.used]
            experts(x, layers, routing.routes, self.spec.activation, partial)

    def leave(self, weights: Weights, total: Floats) -> Floats:
        """What is done to a block's summed output before the residual add."""
        return self._normed(total, weights.vector["post_norm"]) if self.spec.post_norm else total

    def head(self, weights: Weights, hidden: Floats) -> Floats:
        """hidden (R, C) → logits (R, vocab)"""
        return linears(hidden, weights.linears("head"), weights.vector["norm"], self.spec.norm_eps)[0]

    def _pre_norm(self, weights: Weights) -> Floats | None:
        return weights.vector["norm"] if self.spec.pre_norm else None

    def _normed(self, x: Floats, weight: Floats) -> Floats:
        return rms_norm(x, weight, self.spec.norm_eps)


def _likeliest(scores: Floats, count: int) -> list[int]:
    """What the rows (T, n) choose, `count` each, by the sum of the odds that they give it, highest first."""
    chosen, behind = _best(scores, count)
    odds = np.zeros(scores.shape[1])
    np.add.at(odds, chosen, np.nan_to_num(np.exp(-np.take_along_axis(behind, chosen, -1))))
    likeliest: list[int] = np.argsort(-odds, kind="stable")[: np.count_nonzero(odds)].tolist()
    return likeliest


def _best(scores: Floats, count: int) -> tuple[Ids, Doubles]:
    """The `count` best of each row (T, n), of equals the lowest, in no order; and how far all are below the best."""
    with np.errstate(invalid="ignore"):  # rows of NaN, which stay so
        behind = (scores.max(-1, keepdims=True) - scores).astype(np.float64)
    # The bits of what is not negative are ordered as numbers are, and the lowest 29 of an f32 in an f64 are zeros.
    keys = behind.view(np.int64) | np.arange(scores.shape[1])
    return np.partition(keys, count - 1)[:, :count] & (1 << 29) - 1, behind
