"""The executor: carries one step through the blocks of a plan.

The one data path. Weights come from a store, KV goes to a pool, partial sums through a collective; which of
each is the plan's choice and invisible here. A step of many rows passes every block once, its parts one after the
other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Protocol

import numpy as np

from shoal.kernels.arrays import Floats
from shoal.kernels.attention_operands import Rotation
from shoal.models.step import Step
from shoal.models.transformer import Transformer
from shoal.offload.block_store import BlockStore
from shoal.offload.kv.pool import KvPool
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

EXPERTS_TOGETHER = 4  # of those that come from disk: these are computed while the next are read


class Abandoned(Exception):
    """Nobody wants this step any more."""


class Collective(Protocol):
    """Sums partials over the ranks of a group."""

    def allreduce(self, partial: Floats) -> Floats: ...


class Alone:
    """The collective of one rank: the identity."""

    def allreduce(self, partial: Floats) -> Floats:
        return partial


class Executor:
    """Runs steps of one model. Not thread-safe: one step at a time."""

    def __init__(
        self, model: Transformer, plan: Plan, store: BlockStore, kv: KvPool, collective: Collective
    ) -> None:
        self.model = model
        self.plan = plan
        self.store = store
        self.kv = kv
        self.collective = collective
        self._wanted: Callable[[], bool] = lambda: True
        self._head = [item.block for item in plan.blocks if item.block.kind == "head"]
        slots = plan.expert_slots
        self._foreseen = _foreseen(plan)
        self._together = max(1, min(EXPERTS_TOGETHER, slots // 2)) if slots else len(plan.blocks)

    @np.errstate(over="ignore", invalid="ignore")  # infinities and NaN are told of where tokens are chosen
    def forward(self, step: Step, wanted: Callable[[], bool] = lambda: True) -> Floats:
        """→ hidden states (R, hidden) of the rows the step asks for, before the final norm. Raises Abandoned soon after
        `wanted` has become false."""
        self._wanted = wanted
        rotations = [self.model.rotations(part) for part in step.parts]
        hidden = self.model.embed(self.store.rows(BlockId("embed"), step.tokens))
        layers = self.model.spec.layers
        for layer, kind in enumerate(layers):
            self._attend(layer, hidden, step, rotations)
            if layer + 1 == len(layers):
                hidden = hidden[step.rows]  # the rest is not looked at any more
                if not len(hidden):
                    break
            if kind.moe:
                self._mix(layer, hidden, step)
            else:
                self._feed_forward(layer, hidden, step)
        return hidden

    def head(self, hidden: Floats) -> Floats:
        """hidden (R, hidden) → logits (R, vocab)"""
        if len(self._head) == 1:
            with self.store.acquire(self._head[0]) as weights:
                return self.model.head(weights, hidden)
        logits = np.empty((len(hidden), self.model.spec.vocab), np.float32)
        done = 0
        for block in self._head:
            with self.store.acquire(block) as weights:
                part = self.model.head(weights, hidden)
            logits[:, done : done + part.shape[1]] = part
            done += part.shape[1]
        return logits

    def _attend(self, layer: int, hidden: Floats, step: Step, rotations: list[list[Rotation]]) -> None:
        """Adds the attention of a layer to hidden (T, hidden)."""
        with self.store.acquire(BlockId("attn", layer)) as weights:
            for part, rows, turns in zip(step.parts, step.split(hidden), rotations, strict=True):
                self._go_on()
                partial = self.model.attend(layer, weights, rows, part.segments, turns, self.kv.layers[layer])
                rows += self.model.leave(weights, self.collective.allreduce(partial))

    def _feed_forward(self, layer: int, hidden: Floats, step: Step) -> None:
        """Adds the dense feed-forward of a layer to hidden (T, hidden)."""
        with self.store.acquire(BlockId("ffn", layer)) as weights:
            for rows in step.split(hidden):
                self._go_on()
                partial = self.model.feed_forward(weights, rows)
                rows += self.model.leave(weights, self.collective.allreduce(partial))

    def _mix(self, layer: int, hidden: Floats, step: Step) -> None:
        """Adds the mixture of experts of a layer to hidden (T, hidden). Each expert is acquired once for all parts."""
        with self.store.acquire(BlockId("router", layer)) as router:
            routed = [self.model.route(router, rows) for rows in step.split(hidden)]
        partials = [np.zeros_like(x) for x, _, _ in routed]
        used = sorted({expert for _, routing, _ in routed for expert in routing.used})
        blocks = [BlockId("expert", layer, expert) for expert in used]
        self.store.expect(blocks)
        self.store.guess(self._likely(layer, step.split(hidden)[0]))
        for start in range(0, len(blocks), self._together):
            self._go_on()
            group = blocks[start : start + self._together]
            with ExitStack() as held:
                experts = {block.expert: held.enter_context(self.store.acquire(block)) for block in group}
                for (x, routing, _), partial in zip(routed, partials, strict=True):
                    self.model.mix(experts, x, routing, partial)
        for rows, (_, _, shared), partial in zip(step.split(hidden), routed, partials, strict=True):
            if shared is not None:
                partial += shared
            rows += self.model.leave(router, self.collective.allreduce(partial))

    def _go_on(self) -> None:
        """Raises Abandoned when nobody wants the step any more."""
        if not self._wanted():
            raise Abandoned

    def _likely(self, layer: int, hidden: Floats) -> list[BlockId]:
        """The experts that the next mixture may choose for hidden (T, hidden), where guessing helps."""
        if (router := self._foreseen.get(layer)) is None:
            return []
        with self.store.acquire(router) as weights:
            return [BlockId("expert", router.layer, expert) for expert in self.model.foresee(weights, hidden)]


def _foreseen(plan: Plan) -> dict[int, BlockId]:
    """For each layer the router of the next mixture, if that stays in memory and experts do not."""
    routers = [item for item in plan.blocks if item.block.kind == "router"] if plan.expert_slots else []
    return {before.block.layer: item.block for before, item in pairwise(routers) if item.tier == "ram"}
