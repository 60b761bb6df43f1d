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

import torch
from torch import Tensor

from shoal.kernels import Routes, experts, feed_forward, linears, rms_norm
from shoal.kernels.attention import HeadNorms, Rotation, Segments
from shoal.partition.spec import ModelSpec

from .rope import Rope
from .step import KvCache, Part
from .weights import Weights


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
    def of(cls, experts: Tensor, factors: Tensor) -> Routing:
        """Row i of `experts` (T, k) are the choices of token i, with the factors `factors` (T, k)."""
        ordered, pairs = experts.flatten().sort(stable=True)
        used, counts = torch.unique_consecutive(ordered, return_counts=True)
        starts = tuple(accumulate(counts.tolist(), initial=0))
        return cls(used.tolist(), Routes(starts, pairs // experts.shape[1], factors.flatten()[pairs]))


class Transformer:
    """Computes the blocks of one spec."""

    def __init__(self, spec: ModelSpec, context_tokens: int) -> None:
        self.spec = spec
        self._ropes = [Rope(rope, context_tokens) for rope in spec.ropes]

    def rotations(self, part: Part) -> list[Rotation]:
        """cos/sin of a part's positions, one per rope of the spec; computed once, used by every layer."""
        return [rope.at(part.positions) for rope in self._ropes]

    def embed(self, rows: Tensor) -> Tensor:
        """Rows of the embedding (T, C) → hidden (T, C)"""
        return rows * self.spec.embed_scale if self.spec.embed_scale != 1.0 else rows

    def attend(
        self,
        layer: int,
        weights: Weights,
        hidden: Tensor,
        segments: Segments,
        rotations: list[Rotation],
        kv: KvCache,
    ) -> Tensor:
        """hidden (T, C) → partial (T, C); the new K and V are stored in `kv`."""
        spec, vector = self.spec, weights.vector
        q, k, v = linears(  # (T, H*D), (T, K*D) twice
            hidden, weights.linears("q", "k", "v"), self._pre_norm(weights), spec.norm_eps
        )
        norms = None
        if spec.qk_norm == "head" and spec.qkv_clip is None:
            norms = HeadNorms(vector["q_norm"], vector["k_norm"], spec.norm_eps)
        elif spec.qk_norm != "none":  # over rows of one head or of all heads, as long as the norm's weight
            q = self._normed(q.view(-1, len(vector["q_norm"])), vector["q_norm"]).view(q.shape)
            k = self._normed(k.view(-1, len(vector["k_norm"])), vector["k_norm"]).view(k.shape)
        if spec.qkv_clip is not None:
            q, k, v = (t.clamp_(-spec.qkv_clip, spec.qkv_clip) for t in (q, k, v))
        kind = spec.layers[layer]
        mixed = kv.attend(
            layer,
            segments,
            q,
            k,
            v,
            rotation=rotations[kind.rope],
            scale=spec.attention_scale,
            window=kind.window,
            norms=norms,
        )  # (T, H*D)
        return linears(mixed, weights.linears("o"))[0]

    def feed_forward(self, weights: Weights, hidden: Tensor) -> Tensor:
        """Dense block: hidden (T, C) → partial (T, C)."""
        spec = self.spec
        return feed_forward(
            hidden, weights.feed_forward(), spec.activation, self._pre_norm(weights), spec.norm_eps
        )

    def foresee(self, weights: Weights, hidden: Tensor) -> list[int]:
        """Which experts this router will choose if hidden (T, C), of an earlier layer, changes little until then; those
        of most tokens first. That it does change little: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts
        Language Models with Offloading", 2023, section 3.2."""
        moe, norm = self.spec.moe, self._pre_norm(weights)
        assert moe is not None
        x = hidden if norm is None else self._normed(hidden, norm)
        chosen = torch.topk(linears(x, weights.linears("router"))[0], moe.active, -1).indices  # (T, k)
        votes = torch.bincount(chosen.flatten(), minlength=moe.experts)
        return votes.argsort(descending=True)[: int((votes > 0).sum())].tolist()

    def route(self, weights: Weights, hidden: Tensor) -> tuple[Tensor, Routing, Tensor | None]:
        """MoE router block: hidden (T, C) → normed x (T, C), routing, and the shared expert's partial (T, C) if there
        is one."""
        spec, moe, norm = self.spec, self.spec.moe, self._pre_norm(weights)
        assert moe is not None
        x = hidden if norm is None else self._normed(hidden, norm)
        probabilities = torch.softmax(linears(x, weights.linears("router"))[0], -1)  # (T, experts)
        factors, chosen = torch.topk(probabilities, moe.active, -1)  # (T, k)
        if moe.normalize:
            factors = factors / factors.sum(-1, keepdim=True)
        routing = Routing.of(chosen, factors)
        if not moe.shared_ffn:
            return x, routing, None
        shared = feed_forward(x, weights.feed_forward("shared_"), spec.activation)
        if moe.shared_gated:
            # Not torch.sigmoid: its last bit depends on how many rows there are.
            shared /= 1 + torch.exp(-linears(x, weights.linears("shared_scale"))[0])  # (T, 1)
        return x, routing, shared

    def mix(self, weights: Mapping[int, Weights], x: Tensor, routing: Routing, partial: Tensor) -> None:
        """Adds what these experts make of their tokens, ascending, to partial (T, C); normed x (T, C). `weights`: all
        experts, or a run of those in use."""
        routing = routing.among(weights)
        if routing.used:
            layers = [weights[expert].feed_forward() for expert in routing.used]
            experts(x, layers, routing.routes, self.spec.activation, partial)

    def leave(self, weights: Weights, total: Tensor) -> Tensor:
        """What is done to a block's summed output before the residual add."""
        return self._normed(total, weights.vector["post_norm"]) if self.spec.post_norm else total

    def head(self, weights: Weights, hidden: Tensor) -> Tensor:
        """hidden (R, C) → logits (R, vocab)"""
        return linears(hidden, weights.linears("head"), weights.vector["norm"], self.spec.norm_eps)[0]

    def _pre_norm(self, weights: Weights) -> Tensor | None:
        return weights.vector["norm"] if self.spec.pre_norm else None

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.spec.norm_eps)
