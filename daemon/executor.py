"""The executor: carries one step through the blocks of a plan.

The one data path. Weights come from a store, KV goes to a pool, partial sums through a collective; which of
each is the plan's choice and invisible here.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol

from torch import Tensor

from shoal.models.step import KvCache, Step
from shoal.models.transformer import Transformer
from shoal.models.weights import Weights
from shoal.offload.store import BlockStore
from shoal.partition.spec import BlockId


class Collective(Protocol):
    """Sums partials over the ranks of a group."""

    def allreduce(self, partial: Tensor) -> Tensor: ...


class Alone:
    """The collective of one rank: the identity."""

    def allreduce(self, partial: Tensor) -> Tensor:
        return partial


class Executor:
    """Runs steps of one model. Not thread-safe: one step at a time."""

    def __init__(self, model: Transformer, store: BlockStore, kv: KvCache, collective: Collective) -> None:
        self.model = model
        self.store = store
        self.kv = kv
        self.collective = collective

    def forward(self, step: Step) -> Tensor:
        """→ hidden states (R, hidden) of the rows the step asks for, before the final norm."""
        rotations = self.model.rotations(step)
        hidden = self.model.embed(self.store.rows(BlockId("embed"), step.tokens))
        for layer, kind in enumerate(self.model.spec.layers):
            with self.store.acquire(BlockId("attn", layer)) as weights:
                partial = self.model.attend(layer, weights, hidden, step, rotations, self.kv)
            hidden = self._add(hidden, weights, partial)
            if layer + 1 == len(self.model.spec.layers):
                hidden = hidden[step.rows]  # the rest is not looked at any more
                if not len(hidden):
                    break
            if kind.moe:
                weights, partial = self._mixture(layer, hidden)
            else:
                with self.store.acquire(BlockId("ffn", layer)) as weights:
                    partial = self.model.feed_forward(weights, hidden)
            hidden = self._add(hidden, weights, partial)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (R, hidden) → logits (R, vocab)"""
        with self.store.acquire(BlockId("head")) as weights:
            return self.model.head(weights, hidden)

    def _mixture(self, layer: int, hidden: Tensor) -> tuple[Weights, Tensor]:
        """The MoE part of a layer: the router block's weights (for `leave`) and the partial (T, hidden)."""
        with self.store.acquire(BlockId("router", layer)) as router:
            x, routing, shared = self.model.route(router, hidden)
        with ExitStack() as held:
            experts = [
                held.enter_context(self.store.acquire(BlockId("expert", layer, expert)))
                for expert in routing.used
            ]
            partial = self.model.mix(experts, x, routing)
        return router, partial if shared is None else partial.add_(shared)

    def _add(self, hidden: Tensor, weights: Weights, partial: Tensor) -> Tensor:
        """Residual add of a block's summed output; `weights` only for its vectors, which outlive the lease."""
        return hidden + self.model.leave(weights, self.collective.allreduce(partial))
