"""One transformer for every family: what each kind of block computes.

Knows the arithmetic, top to bottom; the differences of a family are data in its `ModelSpec`. Holds no weights
and no KV: both are handed in per block, so the same code serves resident, streamed and sharded weights. What a
block returns is a *partial*: on several ranks the partials are summed before `leave` and the residual add.

Letters in shapes: T tokens of the step, H heads, K kv_heads, D head_dim, C hidden, F ffn columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels import gather_rows, geglu, linear, rms_norm, swiglu
from shoal.kernels.attention import HeadNorms, Rotation
from shoal.partition.spec import ModelSpec

from .rope import Rope
from .step import KvCache, Step
from .weights import Weights


@dataclass(frozen=True, eq=False)
class Routing:
    """Which tokens go to which experts: row i of `experts` (T, k) with the factors `factors` (T, k)."""

    experts: Tensor
    factors: Tensor

    def used(self) -> list[int]:
        """Experts chosen by any token, ascending."""
        return sorted(set(self.experts.flatten().tolist()))

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """(rows (N,), factors (N, 1)) of the tokens that chose `expert`."""
        rows, choice = (self.experts == expert).nonzero(as_tuple=True)
        return rows, self.factors[rows, choice].unsqueeze(1)


class Transformer:
    """Computes the blocks of one spec."""

    def __init__(self, spec: ModelSpec, context_tokens: int) -> None:
        self.spec = spec
        self._ropes = [Rope(rope, context_tokens) for rope in spec.ropes]
        self._activation = swiglu if spec.activation == "silu" else geglu

    def rotations(self, step: Step) -> list[Rotation]:
        """cos/sin of the step's positions, one per rope of the spec; computed once, used by every layer."""
        return [rope.at(step.positions) for rope in self._ropes]

    def embed(self, weights: Weights, step: Step) -> Tensor:
        """→ (T, C)"""
        hidden = gather_rows(weights.matrix["embed"], step.tokens)
        return hidden * self.spec.embed_scale if self.spec.embed_scale != 1.0 else hidden

    def attend(
        self, layer: int, weights: Weights, hidden: Tensor, step: Step, rotations: list[Rotation], kv: KvCache
    ) -> Tensor:
        """hidden (T, C) → partial (T, C); the new K and V are stored in `kv`."""
        spec, matrix, vector = self.spec, weights.matrix, weights.vector
        x = self._enter(weights, hidden)
        q = linear(x, matrix["q"], vector.get("q_bias"))  # (T, H*D)
        k = linear(x, matrix["k"], vector.get("k_bias"))  # (T, K*D)
        v = linear(x, matrix["v"], vector.get("v_bias"))  # (T, K*D)
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
            step,
            q,
            k,
            v,
            rotation=rotations[kind.rope],
            scale=spec.attention_scale,
            window=kind.window,
            norms=norms,
        )  # (T, H*D)
        return linear(mixed, matrix["o"], vector.get("o_bias"))

    def feed_forward(self, weights: Weights, hidden: Tensor) -> Tensor:
        """Dense block: hidden (T, C) → partial (T, C)."""
        vector = weights.vector
        x = self._enter(weights, hidden)
        return self._gated(
            x, weights, "", vector.get("gate_bias"), vector.get("up_bias"), vector.get("down_bias")
        )

    def route(self, weights: Weights, hidden: Tensor) -> tuple[Tensor, Routing, Tensor]:
        """MoE router block: hidden (T, C) → normed x (T, C), routing, and the shared expert's partial (T, C)."""
        moe = self.spec.moe
        assert moe is not None
        x = self._enter(weights, hidden)
        probabilities = torch.softmax(linear(x, weights.matrix["router"]), -1)  # (T, experts)
        factors, experts = torch.topk(probabilities, moe.active, -1)  # (T, k)
        if moe.normalize:
            factors = factors / factors.sum(-1, keepdim=True)
        if not moe.shared_ffn:
            return x, Routing(experts, factors), torch.zeros_like(hidden)
        shared = self._gated(x, weights, "shared_")
        if moe.shared_gated:
            shared *= torch.sigmoid(linear(x, weights.matrix["shared_scale"]))  # (T, 1)
        return x, Routing(experts, factors), shared

    def expert(self, weights: Weights, x: Tensor) -> Tensor:
        """One expert on the tokens routed to it: (N, C) → (N, C), before the routing factor."""
        return self._gated(x, weights, "")

    def leave(self, weights: Weights, total: Tensor) -> Tensor:
        """What is done to a block's summed output before the residual add."""
        return self._normed(total, weights.vector["post_norm"]) if self.spec.post_norm else total

    def head(self, weights: Weights, hidden: Tensor) -> Tensor:
        """hidden (R, C) → logits (R, vocab)"""
        return linear(self._normed(hidden, weights.vector["norm"]), weights.matrix["head"])

    def _enter(self, weights: Weights, hidden: Tensor) -> Tensor:
        return self._normed(hidden, weights.vector["norm"]) if self.spec.pre_norm else hidden

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.spec.norm_eps)

    def _gated(
        self,
        x: Tensor,
        weights: Weights,
        prefix: str,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Tensor:
        gate = linear(x, weights.matrix[prefix + "gate"], gate_bias)  # (T, F)
        up = linear(x, weights.matrix[prefix + "up"], up_bias)  # (T, F)
        return linear(self._activation(gate, up), weights.matrix[prefix + "down"], down_bias)
