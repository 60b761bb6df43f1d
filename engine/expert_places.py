"""Where the experts of a plan are computed, and which of them change places between steps.

A plan says where they are at first. Which experts a mixture uses often is known only when it runs, or has run before.
Those of them that the CPU has then change places, in pairs, with seldom used ones of a device: so memory stays as it
was planned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace

from shoal.kernels import ComputeHome
from shoal.offload.block_store import BlockStore, ResidentStore
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

from .learn.expert_use import NONE_YET, ExpertPair, ExpertUse, UseCounts, all_exchanges, worth_an_exchange


def splits_experts(plan: Plan) -> bool:
    """Whether some experts stay on a device, and others with the CPU."""
    mine, whole = plan.device_experts
    return 0 < mine < whole and not plan.passes


def with_used_experts(plan: Plan, counts: UseCounts) -> Plan:
    """The same plan, in which experts that were used often have the places of a device's that were not, of as many
    bytes."""
    experts = {it.block: it for it in plan.blocks if it.block.kind == "expert"}
    there = {block for block, it in experts.items() if it.tier == "gpu"}
    if not there or not any(counts.uses.values()):
        return plan
    changed = dict(experts)
    for pair in all_exchanges(counts.uses, there, {block: it.nbytes for block, it in experts.items()}):
        for block, other in (pair, reversed(pair)):
            changed[block] = replace(experts[other], block=block)
    return replace(plan, blocks=tuple(changed.get(it.block, it) for it in plan.blocks))


class ExpertPlaces:
    """Of a plan. `home_of` gives the home of a device."""

    def __init__(self, plan: Plan, home_of: Callable[[str], ComputeHome]) -> None:
        experts = [item for item in plan.blocks if item.block.kind == "expert"]
        self._cpu = home_of("cpu") if experts else None
        self._homes = {item.block: home_of(item.device) for item in experts}
        self._layers: dict[int, list[BlockId]] = {}
        for block in self._homes:
            self._layers.setdefault(block.layer, []).append(block)
        self._by_home: dict[int, dict[ComputeHome, set[int]]] = {}
        self._routers = {
            it.block.layer: home_of(it.device) for it in plan.blocks if it.block.kind == "router"
        }
        self.leaving: dict[int, bool] = {}  # whether any of a layer are elsewhere than their router
        for layer in self._layers:
            self._arrange(layer)
        self._slotted = any(item.slotted for item in experts)
        self._use = ExpertUse() if self.counted else None
        self._forms: dict[BlockId, Hashable] = {}
        self._waiting: deque[ExpertPair] = deque()  # exchanges that were worth it when they were looked for

    @property
    def counted(self) -> bool:
        """Whether it counts which are used: some are on a device, and others are not; or they come from disk."""
        return self._slotted or len(set(self._homes.values())) > 1

    @property
    def counts(self) -> UseCounts:
        """How often they were used. Any thread may ask."""
        return self._use.counts if self._use is not None else NONE_YET

    def go_on_from(self, counts: UseCounts) -> None:
        """Before anything was computed: they were used so often already."""
        if self._use is not None:
            self._use = ExpertUse(counts)

    @property
    def layers(self) -> Collection[int]:
        """Those that have any."""
        return self._layers.keys()

    def elsewhere(self, blocks: Sequence[BlockId], home: ComputeHome) -> Collection[int]:
        """Which of these experts of a layer are not in this home."""
        return {block.expert for block in blocks if self._homes[block] is not home}

    def parted(self, layer: int, blocks: Sequence[BlockId]) -> list[tuple[ComputeHome, Sequence[BlockId]]]:
        """Experts of a layer that a part of a step uses, by their home. The CPU, for which a step waits, comes last."""
        if not blocks:
            return []
        if self._use is not None:
            self._use.note(blocks)
        homes = self._by_home[layer]
        if len(homes) == 1:
            return [(home, blocks) for home in homes]
        parted = [(home, [it for it in blocks if it.expert in mine]) for home, mine in homes.items()]
        return [(home, mine) for home, mine in parted if mine]

    def exchange(self, store: BlockStore) -> bool:
        """A pair of experts for which that is worth it changes places. False if there is none. No step may be under
        way. Raises HomeLost."""
        if self._use is None or not isinstance(store, ResidentStore):
            return False
        if not self._waiting and self._use.fresh:
            self._look(store, self._use)
        while self._waiting:
            pair = self._waiting.popleft()
            if worth_an_exchange(self._use.uses, pair):  # still
                self._change(store, *pair)
                return True
        return False

    def _look(self, store: ResidentStore, use: ExpertUse) -> None:
        """See which exchanges are worth it. It takes longer than one of them."""
        use.seen()
        self._forms = self._forms or {block: _form(store, block) for block in self._homes}
        there = {block for block, home in self._homes.items() if home is not self._cpu}
        self._waiting.extend(all_exchanges(use.uses, there, self._forms))

    def _change(self, store: ResidentStore, going: BlockId, coming: BlockId) -> None:
        store.exchange(going, coming, self._homes[going])
        self._homes[going], self._homes[coming] = self._homes[coming], self._homes[going]
        for block in (going, coming):
            self._arrange(block.layer)

    def _arrange(self, layer: int) -> None:
        homes: dict[ComputeHome, set[int]] = {}
        for block in sorted(self._layers[layer], key=lambda block: self._homes[block] is self._cpu):
            homes.setdefault(self._homes[block], set()).add(block.expert)
        self._by_home[layer] = homes
        self.leaving[layer] = any(home is not self._routers[layer] for home in homes)


def _form(store: ResidentStore, block: BlockId) -> Hashable:
    """What two experts have to have in common to change places."""
    with store.acquire(block) as weights:
        return tuple(
            (role, it.type.name, it.rows, it.cols, it.data.flags.writeable)
            for role, it in sorted(weights.matrix.items())
        )
