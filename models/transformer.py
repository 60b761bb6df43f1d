"""One transformer for every family: what each kind of block computes.

Knows the arithmetic, top to bottom; the differences of a family are data in its `ModelSpec`. Holds no weights
and no KV: callers hand in both for each block, so the same code serves resident, streamed and sharded weights. What
a block returns is a *partial*: on several ranks the partials are summed before `leave` and the residual add. Hidden
states pass from one call of the block's home to the next, and nothing here looks into them.

Letters in shapes: T tokens of the step, H heads, K kv_heads, D head_dim, C hidden, F ffn columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shoal.kernels import ComputeHome
from shoal.kernels.arrays import Floats, Hidden
from shoal.kernels.attention_operands import HeadNorms, KvPages, Rotation, Scoring, Segments
from shoal.kernels.compute_home import carried
from shoal.kernels.routing import Routing
from shoal.partition.spec import ModelSpec

from .rope import Rope, joined
from .step import Part
from .weights import Weights, narrow_roles

_KEPT_LENGTHS = 64  # dynamic NTK has a rope for every length of text


class Transformer:
    """Computes the blocks of one spec. `narrow_inputs`: what some quantised matrices multiply is rounded to 8 bits
    instead of 16 (`narrow_roles`)."""

    def __init__(self, spec: ModelSpec, narrow_inputs: bool = False) -> None:
        self.spec = spec
        self._narrow = [
            narrow_roles(spec, layer) if narrow_inputs else frozenset[str]()
            for layer in range(len(spec.layers))
        ]
        self._ropes: dict[int, list[Rope]] = {}  # by the length of the text that they are for

    def rotations(self, part: Part) -> list[Rotation]:
        """cos/sin of a part's positions, one per rope of the spec; computed once, used by every layer."""
        turned, start = [], 0
        for length, rows in part.lengths:
            positions = part.positions[start : start + rows]
            turned.append([rope.at(positions) for rope in self._ropes_for(length)])
            start += rows
        return [joined(list(runs)) for runs in zip(*turned, strict=True)]

    def _ropes_for(self, length: int) -> list[Rope]:
        known = self._ropes.get(length)
        if known is None:
            if len(self._ropes) >= _KEPT_LENGTHS:
                self._ropes.clear()
            known = self._ropes[length] = [Rope(rope, length) for rope in self.spec.ropes]
        return known

    def embed(self, home: ComputeHome, rows: Hidden) -> Hidden:
        """Rows of the embedding (T, C) → hidden (T, C)"""
        return home.scale(rows, self.spec.embed_scale) if self.spec.embed_scale != 1.0 else rows

    def attend(
        self,
        home: ComputeHome,
        layer: int,
        weights: Weights,
        hidden: Hidden,
        segments: Segments,
        rotations: list[Rotation],
        kv: KvPages,
        allreduce: Callable[[Hidden], Hidden],
        looking: tuple[ComputeHome, Weights] | None = None,
    ) -> Hidden:
        """hidden (T, C) → partial (T, C); stores the new K and V in `kv`, the layer's pages. `allreduce` sums over
        ranks, which norms over all heads need. `looking`: where `kv` lies, if elsewhere, with the vectors there."""
        there, vectors = looking or (home, weights)
        q, k, v = self.asked(home, weights, hidden, allreduce)
        if there is not home:
            home.prefetch(q, k, v)
        q, k, v = (carried(x, home, there) for x in (q, k, v))
        mixed = self.look_back(there, layer, vectors, q, k, v, segments, rotations, kv)
        return self.attended(home, layer, weights, carried(mixed, there, home))

    def asked(
        self, home: ComputeHome, weights: Weights, hidden: Hidden, allreduce: Callable[[Hidden], Hidden]
    ) -> tuple[Hidden, Hidden, Hidden]:
        """First part of `attend`: hidden (T, C) → q (T, H*D), k and v (T, K*D), neither turned nor normalised by
        heads."""
        spec, vector = self.spec, weights.vector
        q, k, v = home.linears(hidden, weights.linears("q", "k", "v"), self._pre_norm(weights), spec.norm_eps)
        if self._normed_by_heads:
            return q, k, v
        if spec.norm_share is not None:
            q, k = self._normed_over_ranks(home, q, k, vector, allreduce)
        elif spec.qk_norm != "none":
            # Over one head or all heads: as many dimensions as the norm's weight has.
            q = home.rms_norm_heads(q, vector["q_norm"], spec.norm_eps)
            k = home.rms_norm_heads(k, vector["k_norm"], spec.norm_eps)
        if spec.qkv_clip is not None:
            for x in (q, k, v):
                home.clip(x, spec.qkv_clip)
        return q, k, v

    def look_back(
        self,
        home: ComputeHome,
        layer: int,
        weights: Weights,
        q: Hidden,
        k: Hidden,
        v: Hidden,
        segments: Segments,
        rotations: list[Rotation],
        kv: KvPages,
    ) -> Hidden:
        """Second part: what `asked` gave → (T, H*D). Needs no matrices. K and V lie in this home."""
        spec, vector = self.spec, weights.vector
        norms = None
        if self._normed_by_heads:
            norms = HeadNorms(vector["q_norm"], vector["k_norm"], spec.norm_eps)
        kind = spec.layers[layer]
        scoring = Scoring(rotations[kind.rope], spec.attention_scale, kind.window, norms)
        return home.attention(kv, segments, q, k, v, scoring)

    def attended(self, home: ComputeHome, layer: int, weights: Weights, mixed: Hidden) -> Hidden:
        """Third part: what `look_back` gave → partial (T, C)."""
        if any(self.spec.o_margins):  # a shard's o has columns that belong to heads of other ranks
            mixed = home.pad(mixed, self.spec.o_margins)
        return home.linears(mixed, weights.linears("o", narrow=self._narrow[layer]))[0]

    @property
    def _normed_by_heads(self) -> bool:
        """Whether attention itself normalises q and k."""
        return self.spec.qk_norm == "head" and self.spec.qkv_clip is None

    def feed_forward(self, home: ComputeHome, layer: int, weights: Weights, hidden: Hidden) -> Hidden:
        """Dense block: hidden (T, C) → partial (T, C)."""
        spec = self.spec
        made = weights.feed_forward(spec.activation, narrow=self._narrow[layer])
        return home.feed_forward(hidden, made, self._pre_norm(weights), spec.norm_eps)

    def foresee(self, home: ComputeHome, weights: Weights, hidden: Hidden) -> list[int]:
        """The experts that this router would choose for hidden (T, C) of an earlier layer, the likeliest first.

        The guess is good because hidden states change little from layer to layer: Eliseev and Mazur, "Fast Inference
        of Mixture-of-Experts Language Models with Offloading", 2023, section 3.2.
        """
        assert self.spec.moe is not None
        x = self._normed(home, hidden, self._pre_norm(weights))
        return home.likeliest(home.scores(x, weights.linears("router")), self.spec.moe.active)

    def route(
        self, home: ComputeHome, weights: Weights, hidden: Hidden, leaves: bool = False
    ) -> tuple[Hidden, Routing, Hidden | None]:
        """MoE router block: hidden (T, C) → normed x (T, C), routing, and the shared expert's partial (T, C) if there
        is one. `leaves`: x will be fetched, because experts are computed elsewhere."""
        spec, moe = self.spec, self.spec.moe
        assert moe is not None
        x = self._normed(home, hidden, self._pre_norm(weights))
        scores = home.scores(x, weights.linears("router"))  # (T, experts)
        home.prefetch(*((scores, x) if leaves else (scores,)))
        shared = None
        if moe.shared_ffn:
            shared = home.feed_forward(x, weights.feed_forward(spec.activation, "shared_"))
            if moe.shared_gated:
                home.gate(shared, home.linears(x, weights.linears("shared_scale"))[0])  # by (T, 1)
        return x, home.route(scores, moe.active, moe.normalize), shared

    def mix(
        self,
        home: ComputeHome,
        layer: int,
        weights: Mapping[int, Weights],
        x: Hidden,
        routing: Routing,
        partial: Hidden,
    ) -> None:
        """Adds to partial (T, C) what these experts compute for their tokens, expert by expert, ascending. x: normed
        (T, C). weights: of all experts, or of some."""
        routing = routing.among(weights)
        if routing.used:
            layers = [
                weights[expert].feed_forward(self.spec.activation, narrow=self._narrow[layer])
                for expert in routing.used
            ]
            home.experts(x, layers, routing.routes, partial)

    def leave(self, home: ComputeHome, weights: Weights, total: Hidden) -> Hidden:
        """total (T, C), a block's output summed over ranks → what is added to the residual stream."""
        return self._normed(home, total, weights.vector["post_norm"]) if self.spec.post_norm else total

    def head(self, home: ComputeHome, weights: Weights, hidden: Hidden) -> Hidden:
        """hidden (R, C) → logits (R, vocab)"""
        return home.linears(hidden, weights.linears("head"), weights.vector["norm"], self.spec.norm_eps)[0]

    def _normed_over_ranks(
        self,
        home: ComputeHome,
        q: Hidden,
        k: Hidden,
        vector: Mapping[str, Floats],
        allreduce: Callable[[Hidden], Hidden],
    ) -> tuple[Hidden, Hidden]:
        """A shard's q (T, H*D) and k (T, K*D), normalised over the heads of all ranks."""
        share, dim, eps = self.spec.norm_share, self.spec.head_dim, self.spec.norm_eps
        assert share is not None
        squares = allreduce(home.squares([q, k], [True, share.adds_kv]))  # (T, 2)
        return (
            home.normed_by(q, vector["q_norm"], squares, 0, share.heads * dim, eps),
            home.normed_by(k, vector["k_norm"], squares, 1, share.kv_heads * dim, eps),
        )

    def _pre_norm(self, weights: Weights) -> Floats | None:
        return weights.vector["norm"] if self.spec.pre_norm else None

    def _normed(self, home: ComputeHome, x: Hidden, weight: Floats | None) -> Hidden:
        """x (T, C) normalised, or as it is where the family has no norm."""
        return x if weight is None else home.rms_norm(x, weight, self.spec.norm_eps)
