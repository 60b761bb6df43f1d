"""The executor: carries one step through the blocks of a plan.

This is the one data path. Every block is computed in the home of its device, with weights from a store, KV in a pool
and partial sums through a collective. Which ones is the plan's choice and invisible here, and so is what hidden states
are made of: they stay in one home until the next block has another. A step of many rows passes through every block
once, one part of it after the other; while the next part is computed, the sum of the one before it travels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial as bound
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from shoal.kernels import ComputeHome, home_of
from shoal.kernels.arrays import Floats, Hidden, Ids
from shoal.kernels.attention_operands import Rotation
from shoal.kernels.compute_home import carried
from shoal.kernels.routing import Routing
from shoal.models.step import Step
from shoal.models.transformer import Transformer
from shoal.models.weights import Weights
from shoal.offload.block_store import BlockStore, ResidentStore
from shoal.offload.kv.pool import KvPool
from shoal.partition.plan import Plan
from shoal.partition.slicing import Range
from shoal.partition.spec import BlockId
from shoal.partition.streamed_plan import experts_together

from .collective import Collective, PendingSum
from .expert_places import ExpertPlaces
from .expert_staging import ExpertStaging
from .passing.alternating import Alternating
from .passing.coming_layers import ComingLayers

StillWanted = Callable[[float], bool]
"""Is told which share of a step is done, many times in it; False when nobody wants the step any more."""


class Abandoned(Exception):
    """Nobody wants this step any more."""


class Placed(NamedTuple):
    """A block and where it is computed."""

    block: BlockId
    home: ComputeHome


class _Travelling(NamedTuple):
    """The sum of a part of a step, on its way: what comes of it is added to the part's hidden states (T, C)."""

    part: int
    hidden: Hidden
    home: ComputeHome
    weights: Weights
    total: PendingSum


Routed = tuple[Hidden, Routing, Hidden | None]
"""What `Transformer.route` gives for the rows of a part."""


class Executor:
    """Runs steps of one model. Not thread-safe: one step at a time.

    `home_of` gives the home of a device. Experts of a layer may have several. Of several ranks, rank 0 alone has
    embedding and head, or they are cut: then `vocab` are the rows that this rank has. A rank without them needs no
    token ids.
    """

    def __init__(
        self,
        model: Transformer,
        plan: Plan,
        store: BlockStore,
        kv: KvPool,
        collective: Collective,
        home_of: Callable[[str], ComputeHome] = home_of,
        vocab: Range | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.store = store
        self.kv = kv
        self.collective = collective
        self.vocab = vocab
        self._wanted: StillWanted = lambda share: True
        self._share = 0.0  # of the step, done
        self._travelling: deque[_Travelling] = deque()  # at most two, in the order in which they were started
        placed = {item.block: Placed(item.block, home_of(item.device)) for item in plan.blocks}
        self._layers = [
            (placed[BlockId("attn", layer)], placed[BlockId("router" if kind.moe else "ffn", layer)])
            for layer, kind in enumerate(model.spec.layers)
        ]
        self._experts = ExpertPlaces(plan, home_of)
        self._staging = ExpertStaging(plan, home_of)
        self._coming = ComingLayers(plan, store, home_of)
        self._alternating = Alternating(model, plan, store, kv, home_of) if plan.passes else None
        own = model.spec.moe.own if model.spec.moe else ()
        self._own = {
            layer: {it: BlockId("expert", layer, it) for it in own} for layer in self._experts.layers
        }
        self._embed = placed.get(BlockId("embed"), self._layers[0][0])
        self._head = [placed[item.block] for item in plan.blocks if item.block.kind == "head"]
        slots = plan.expert_slots
        self._foreseen = _foreseen(plan)
        self._together = experts_together(slots) if slots else len(plan.blocks)

    @property
    def experts(self) -> ExpertPlaces:
        """Where they are, and how often they were used."""
        return self._experts

    @property
    def trouble(self) -> str:
        """What is not as it could be with weights that pass through a device, in one line."""
        return self._alternating.trouble if self._alternating is not None else self._coming.trouble

    def close(self) -> None:
        """End what runs in the background. It runs no step any more. Idempotent."""
        self.store.close()
        self._coming.let_go()
        if self._alternating is not None:
            self._alternating.let_go()

    def let_go(self) -> None:
        """Give the memory of weights and KV back, too."""
        self.close()
        self.store = ResidentStore({})
        self._staging.let_go()
        self._alternating = None
        self.kv.let_go()

    def exchange_experts(self) -> bool:
        """While no step is under way: an expert that is used often, and lies with the CPU, changes places with one that
        is not, and lies on a device. False if that is worth it for none. Raises HomeLost."""
        return self._experts.exchange(self.store)

    @np.errstate(over="ignore", invalid="ignore")  # whoever samples notices infinities and NaN
    def forward(self, step: Step, wanted: StillWanted = lambda share: True) -> Hidden:
        """→ hidden states (R, hidden) of the rows the step asks for, before the final norm, for `head`. Raises
        Abandoned soon after `wanted` has become false."""
        self._wanted = wanted
        try:
            return self._through_blocks(step)
        finally:
            self._travelling.clear()
            self.collective.settle()

    def _through_blocks(self, step: Step) -> Hidden:
        rotations = [self.model.rotations(part) for part in step.parts]
        hidden, home = self._embedded(step.tokens), self._embed.home
        if self._alternating is not None:
            there = self._alternating.home
            hidden = carried(hidden, home, there)
            hidden = self._alternating.through_layers(step, rotations, hidden, self._go_on_from)
            return carried(hidden, there, self._head[0].home) if self._head else hidden
        count = len(step.tokens)
        parts = step.split(count)
        self._coming.begin(count)
        for done, placed in enumerate(self._layers):
            self._share = done / len(self._layers)
            attention = self._for_step(placed[0], count)
            hidden, home = self._moved(hidden, home, attention.home), attention.home
            self._attend(attention, [home.rows(hidden, part) for part in parts], step, rotations)
            if placed is self._layers[-1]:
                self._arrive()
                hidden = home.rows(hidden, step.rows)  # nobody needs the others any more
                count = len(step.rows)
                parts = step.split(count)
                if not count:
                    break
            feeding = self._for_step(placed[1], count)
            hidden, home = self._moved(hidden, home, feeding.home), feeding.home
            its = [home.rows(hidden, part) for part in parts]
            if feeding.block.kind == "router":
                self._mix(feeding, its, self._staging.pays(home, count))
            else:
                self._feed_forward(feeding, its)
        self._arrive()
        self._coming.end()
        return carried(hidden, home, self._head[0].home) if self._head else hidden

    def _embedded(self, tokens: Ids) -> Hidden:
        """Hidden states (T, hidden) of tokens (T,). Where the embedding is cut, a rank without a token's row
        contributes zeros to the sum."""
        block, home = self._embed
        shape = len(tokens), self.model.spec.hidden
        if self.vocab is None:
            found = self.store.rows(block, tokens) if block.kind == "embed" else None
            hidden = home.place(self.collective.broadcast(found, shape))
        else:
            mine = (tokens >= self.vocab.start) & (tokens < self.vocab.stop)
            rows = np.zeros(shape, np.float32)
            rows[mine] = self.store.rows(block, tokens[mine] - self.vocab.start)
            hidden = self.collective.allreduce(home, home.place(rows))
        return self.model.embed(home, hidden)

    def head(self, hidden: Hidden, rows: slice = slice(None)) -> Floats:
        """Hidden states (R, hidden), or some rows of them → logits (R, vocab) on the host, at rank 0; (0, 0) on a rank
        without a head."""
        if not self._head:
            return np.empty((0, 0), np.float32)
        first = self._head[0].home
        hidden = first.rows(hidden, rows)
        logits = np.empty((0, 0), np.float32)
        done = 0
        for block, home in self._head:
            with self.store.acquire(block) as weights:
                part = home.fetch(self.model.head(home, weights, carried(hidden, first, home)))
            if len(self._head) == 1:
                logits = part
            else:  # one array is filled: all slices and their whole would take twice the memory
                if not done:
                    logits = np.empty((len(part), self.model.spec.vocab), np.float32)
                logits[:, done : done + part.shape[1]] = part
                done += part.shape[1]
        return logits if self.vocab is None else self.collective.gather(logits)

    def _for_step(self, placed: Placed, tokens: int) -> Placed:
        """Where a block is computed in this step, if so many tokens pass it."""
        there = self._coming.home_for(placed.block, tokens)
        return placed if there is None else Placed(placed.block, there)

    def _acquire(self, placed: Placed) -> AbstractContextManager[Weights]:
        return self._coming.lend(*placed) or self.store.acquire(placed.block)

    def _attend(
        self, placed: Placed, rows: Sequence[Hidden], step: Step, rotations: Sequence[list[Rotation]]
    ) -> None:
        """Adds the attention of a layer to hidden (T, hidden). `rows` are the parts of hidden, as the step has them."""
        block, home = placed
        layer, kv = block.layer, self.kv.layers[block.layer]
        allreduce = bound(self.collective.allreduce, home)
        own = self._layers[layer][0].home
        looking = (own, self.store.coming(block).weights) if own is not home else None
        with self._acquire(placed) as weights:
            for part, (its, turns) in enumerate(zip(step.parts, rotations, strict=True)):
                rest = its.segments, turns, kv, allreduce, looking
                partial = self.model.attend(home, layer, weights, self._next(rows, part), *rest)
                self._leave(home, weights, rows, part, partial)

    def _feed_forward(self, placed: Placed, rows: Sequence[Hidden]) -> None:
        """Adds the dense feed-forward of a layer to hidden (T, hidden). `rows` are the parts of hidden."""
        block, home = placed
        with self._acquire(placed) as weights:
            for part in range(len(rows)):
                partial = self.model.feed_forward(home, block.layer, weights, self._next(rows, part))
                self._leave(home, weights, rows, part, partial)

    def _mix(self, placed: Placed, rows: Sequence[Hidden], come: bool) -> None:
        """Adds the mixture of experts of a layer to hidden (T, hidden). `rows` are the parts of hidden. `come`: experts
        that are elsewhere come to the router's home. Those that have to, from there or from disk, do so once for all
        parts."""
        block = placed.block
        if self.plan.expert_slots or come:
            with self.store.acquire(block) as router:
                routed = [self._routed(placed, router, rows, part, come) for part in range(len(rows))]
            self._mix_routed(placed, router, rows, dict(enumerate(routed)), come)
            return
        with self.store.acquire(block) as router:
            for part in range(len(rows)):
                routed_part = self._routed(placed, router, rows, part, come)
                self._mix_routed(placed, router, rows, {part: routed_part}, come)

    def _routed(
        self, placed: Placed, router: Weights, rows: Sequence[Hidden], part: int, come: bool
    ) -> Routed:
        block, home = placed
        leaves = not come and self._experts.leaving[block.layer]
        return self.model.route(home, router, self._next(rows, part), leaves)

    def _mix_routed(
        self,
        placed: Placed,
        router: Weights,
        rows: Sequence[Hidden],
        routed: Mapping[int, Routed],
        come: bool,
    ) -> None:
        """Has experts compute some parts of a step: where they are, or where their router is, to which they `come`."""
        block, home = placed
        layer, own = block.layer, self._own[block.layer]
        used = {expert for _, routing, _ in routed.values() for expert in routing.used}
        blocks = [own[expert] for expert in sorted(used) if expert in own]
        self.store.expect(blocks)
        self.store.guess(self._likely(layer, rows[0], home))
        parted = [(home, blocks)] if come and blocks else self._experts.parted(layer, blocks)
        mixed = {there: self._mixed_there(home, there, mine, routed.values(), come) for there, mine in parted}
        for index, (part, (x, _, shared)) in enumerate(routed.items()):
            sums = [carried(partials[index], there, home) for there, partials in mixed.items()]
            partial, *more = sums or [home.zeros_like(x)]
            for its in more if shared is None else (*more, shared):
                home.add(partial, its)
            self._leave(home, router, rows, part, partial)

    def _mixed_there(
        self,
        home: ComputeHome,
        there: ComputeHome,
        blocks: Sequence[BlockId],
        routed: Collection[Routed],
        come: bool,
    ) -> list[Hidden]:
        """What these experts make `there` of what their router in `home` sends them, for each part (T, C). If some lie
        elsewhere, they `come`; while some are computed, so do the next."""
        normed = [carried(x, home, there) for x, _, _ in routed]
        partials = [there.zeros_like(x) for x in normed]
        coming = self._experts.elsewhere(blocks, there) if come else ()
        groups = self._staging.cut(blocks, coming) if coming else _batched(blocks, self._together)
        for number, group in enumerate(groups):
            self._go_on()
            with self.store.acquire_all(group) as weights:
                experts: Mapping[int, Weights] = {
                    block.expert: its for block, its in zip(group, weights, strict=True)
                }
                if coming:
                    experts = self._staging.brought(experts, coming, number)
                for x, (_, routing, _), partial in zip(normed, routed, partials, strict=True):
                    self.model.mix(there, group[0].layer, experts, x, routing, partial)
        return partials

    def _next(self, rows: Sequence[Hidden], part: int) -> Hidden:
        """The rows of a part, when it is to be computed: what it waits for has arrived."""
        self._go_on()
        while len(self._travelling) > 1 or (self._travelling and self._travelling[0].part == part):
            self._arrive_one()
        return rows[part]

    def _leave(
        self, home: ComputeHome, weights: Weights, rows: Sequence[Hidden], part: int, partial: Hidden
    ) -> None:
        """A part was computed, and is added to its rows: now, or while other parts are computed."""
        if len(rows) == 1:
            home.add(rows[part], self.model.leave(home, weights, self.collective.allreduce(home, partial)))
            return
        while len(self._travelling) > 1:
            self._arrive_one()
        total = self.collective.start(home, partial)
        self._travelling.append(_Travelling(part, rows[part], home, weights, total))

    def _arrive(self) -> None:
        """Wait until nothing is on its way."""
        while self._travelling:
            self._arrive_one()

    def _arrive_one(self) -> None:
        _, hidden, home, weights, total = self._travelling.popleft()
        home.add(hidden, self.model.leave(home, weights, total()))  # vectors outlive the lease

    def _moved(self, hidden: Hidden, source: ComputeHome, target: ComputeHome) -> Hidden:
        """`carried`, when all that is to be added has been."""
        if source is not target:
            self._arrive()
        return carried(hidden, source, target)

    def _go_on(self) -> None:
        """Raises Abandoned when nobody wants the step any more."""
        if not self._wanted(self._share):
            raise Abandoned

    def _go_on_from(self, share: float) -> None:
        self._share = share
        self._go_on()

    def _likely(self, layer: int, hidden: Hidden, home: ComputeHome) -> list[BlockId]:
        """The experts that the next mixture will probably choose for hidden (T, hidden), where guessing helps."""
        if (router := self._foreseen.get(layer)) is None:
            return []
        there = self._layers[router.layer][1].home
        with self.store.acquire(router) as weights:
            likely = self.model.foresee(there, weights, carried(hidden, home, there))
        own = self._own[router.layer]
        return [own[expert] for expert in likely if expert in own]


def _batched(blocks: Sequence[BlockId], count: int) -> Iterator[Sequence[BlockId]]:
    return (blocks[start : start + count] for start in range(0, len(blocks), count))


def attention_homes(plan: Plan, home_of: Callable[[str], ComputeHome]) -> list[ComputeHome]:
    """The home that computes the attention of each layer: its K and V lie there."""
    attention = [item for item in plan.blocks if item.block.kind == "attn"]
    return [home_of("cpu" if item.passes else item.device) for item in attention]


def _foreseen(plan: Plan) -> dict[int, BlockId]:
    """For each layer of a mixture the router of the next one, if routers stay where they are and experts do not."""
    routers = [item for item in plan.blocks if item.block.kind == "router"] if plan.expert_slots else []
    return {before.block.layer: item.block for before, item in pairwise(routers) if item.tier != "disk"}
