"""Forms groups: which workers take part in running a model, with which shards and plans.

Knows members and their facts, and how a model can be cut. How a group lives is `group`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import NamedTuple, Protocol

from shoal.comm.group.channel import Channel
from shoal.comm.group.sums.manners import Manner, Manners
from shoal.comm.group.sums.wire_types import WireType
from shoal.daemon.config import CLUSTER_WIRES, NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.loading.grouping import FormedGroup, Seated, Unseated
from shoal.daemon.loading.planning import extents, rank_part, wanted_of
from shoal.daemon.memory import bounded
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint, CheckpointShard
from shoal.offload.pack.layout import grains_of
from shoal.offload.pack.manifest import Quant
from shoal.partition.amounts import format_bytes
from shoal.partition.group_choice import Choice, NoGroup
from shoal.partition.group_search import AVAILABLE_TOPOLOGIES, choose
from shoal.partition.machines import Links, LinkSpeed, Machine
from shoal.partition.plan import Misfit, Plan, Wanted, plan_in_ram
from shoal.partition.rank_plans import RankPart, rank_plans
from shoal.partition.slicing import Grains, Shard, divide
from shoal.partition.spec import BlockId
from shoal.partition.sum_cost import Means, Network, Topology

from .group import Group, Seat, Settle
from .member import Member
from .roster import Roster
from .speed import NodeSpeed

log = logging.getLogger(__name__)


class Serving(Protocol):
    """See `shard_stores.send_weights`."""

    def __call__(
        self, checkpoint: Checkpoint, quant: Quant, *, bounded: bool
    ) -> Callable[[Channel, Shard], None]: ...


class Choosing(Protocol):
    """See `partition.group_search.choose`."""

    def __call__(
        self,
        wanted: Wanted,
        block_bytes: Mapping[BlockId, int],
        machines: Sequence[Machine],
        links: Links,
        *,
        grains: Grains,
        topologies: Sequence[Topology],
        wires: Sequence[WireType],
        ranks: int | None,
    ) -> Choice | NoGroup: ...


class Forming:
    """For the head of a cluster. `serving`: how weights are sent. `speed` measures this machine."""

    def __init__(
        self,
        roster: Roster,
        serving: Serving,
        speed: Callable[[], NodeSpeed],
        choosing: Choosing = choose,
    ) -> None:
        self._roster = roster
        self._serving = serving
        self._speed = speed
        self._choosing = choosing

    @property
    def machines(self) -> int:
        return len(self._roster.usable) + 1

    @property
    def arrivals(self) -> int:
        return self._roster.arrivals

    def seat(
        self, name: str, checkpoint: Checkpoint, config: NodeConfig, free_bytes: int
    ) -> Seated | Unseated:
        members = self._roster.usable
        if config.ranks is not None and config.ranks > len(members) + 1:
            there = ", ".join(member.name for member in members) or "nobody"
            message = f"{config.ranks} ranks were asked for, and besides this machine there is {there}"
            for member in self._roster.members:
                if left_s := self._roster.faults.left_s(member.fingerprint):
                    message += f"; {member.name} did not take its part lately and is not asked for {left_s:.0f} s more"
            raise DaemonError("resources", message, "see shoal cluster nodes")
        if not members or config.ranks == 1:
            return Unseated("")
        choice = self._choice(name, checkpoint, config, members, free_bytes)
        if isinstance(choice, NoGroup):
            if config.ranks is not None:
                raise DaemonError("resources", f"{name}: {choice.describe()}")
            return Unseated(choice.describe())
        if len(choice.ranks) == 1:
            return Unseated(choice.describe())
        return self._seated(name, checkpoint, config, members, choice, free_bytes)

    def better(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: NodeConfig,
        group: FormedGroup | None,
        free_bytes: int,
    ) -> bool:
        members = self._roster.usable
        now = list(group.names) if group is not None else []
        if not members:
            return bool(now)
        choice = self._choice(name, checkpoint, config, members, free_bytes)
        if isinstance(choice, NoGroup):
            return False
        return sorted(it.machine for it in choice.ranks[1:]) != sorted(now)

    def _choice(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: NodeConfig,
        members: Sequence[Member],
        free_bytes: int,
    ) -> Choice | NoGroup:
        machines = self._machines(name, config, members, free_bytes)
        links = {(0, place): member.link for place, member in enumerate(members, 1)}
        for (one, near), (other, far) in combinations(enumerate(members, 1), 2):
            if (link := self._roster.pairs.between(near, far)) is not None:
                links[one, other] = link
        sizes, _ = extents(checkpoint, config.quant)
        grains = grains_of(checkpoint, config.quant)
        # If no context was asked for, a shorter one may keep it in memory alone: that is what groups are compared with.
        contexts = wanted_of(checkpoint.spec, config)
        resident = (
            it for it in contexts if isinstance(plan_in_ram(it, sizes, memory_bytes=free_bytes), Plan)
        )
        wanted = next(resident, contexts[0])
        choice = self._choosing(
            wanted,
            sizes,
            machines,
            links,
            grains=grains,
            topologies=_topologies(members),
            wires=_wires(config),
            ranks=config.ranks,
        )
        log.info("%s: %s", checkpoint.name, choice.describe())
        return choice

    def _machines(
        self, name: str, config: NodeConfig, members: Sequence[Member], free_bytes: int
    ) -> list[Machine]:
        own = self._speed()
        head = Machine(
            "this machine",
            free_bytes,
            own.memory_bytes_per_s,
            own.flops,
            own.disk_bytes_per_s,
            config.thread_count,
        )
        return [head, *(_machine(member, name) for member in members)]

    def _settling(
        self,
        name: str,
        config: NodeConfig,
        chosen: Sequence[Member],
        free_bytes: int,
        hidden: int,
        plan: Plan,
    ) -> Settle:
        """What decides how sums are made, once the members have met and their links are measured."""
        machines = self._machines(name, config, chosen, free_bytes)
        means = [Means(*each) for each in product(_topologies(chosen), _wires(config))]

        def settle(between: Mapping[tuple[int, int], LinkSpeed]) -> Manners:
            links = {(0, rank): member.link for rank, member in enumerate(chosen, 1)} | dict(between)
            network = Network(machines, links, range(len(machines)))
            found = network.plan(means, plan.part_tokens, hidden)
            if found is None:
                return Manners()
            return Manners(Manner(*found.few), Manner(*found.many), found.many_rows)

        return settle

    def _seated(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: NodeConfig,
        members: Sequence[Member],
        choice: Choice,
        free_bytes: int,
    ) -> Seated | Unseated:
        chosen = [members[rank.place - 1] for rank in choice.ranks[1:]]
        grains = grains_of(checkpoint, config.quant)
        shards = divide(checkpoint.spec, len(choice.ranks), grains, choice.shares, experts=choice.experts)
        parts: list[AnyCheckpoint] = [CheckpointShard(checkpoint, shard) for shard in shards]
        rooms = [free_bytes, *(member.room_bytes(name) for member in chosen)]
        threads = [config.thread_count, *(member.facts.threads for member in chosen)]
        needs = [
            rank_part(part, config.quant, room, own)
            for part, room, own in zip(parts, rooms, threads, strict=True)
        ]
        plans = _plans(wanted_of(checkpoint.spec, config), needs)
        if isinstance(plans, TooTight):
            who = chosen[plans.rank - 1].name if plans.rank else "this machine"
            said = f"{who} needs {format_bytes(plans.least_bytes)} for its part of {name}"
            if config.ranks is not None:
                raise DaemonError("resources", said)
            return Unseated(said)
        specs = [part.spec for part in parts[1:]]
        group = Group(
            self._roster,
            name,
            [Seat(*it) for it in zip(chosen, shards[1:], specs, plans[1:], strict=True)],
            config.quant,
            "f32",
            self._serving(checkpoint, config.quant, bounded=bounded(config.memory_bytes)),
            plans[0].weights_bytes,
            self._settling(name, config, chosen, free_bytes, checkpoint.spec.hidden, plans[0]),
        )
        group.begin()
        return Seated(parts[0], plans[0], group, choice.describe())


def _topologies(members: Sequence[Member]) -> Sequence[Topology]:
    """What all of them can do."""
    return AVAILABLE_TOPOLOGIES if all(member.meets_fellows for member in members) else ("star",)


def _wires(config: NodeConfig) -> Sequence[WireType]:
    """From exact numbers to those that were allowed."""
    return CLUSTER_WIRES[: 1 + CLUSTER_WIRES.index(config.cluster_wire)]


def _machine(member: Member, model: str) -> Machine:
    facts = member.facts
    return Machine(
        member.name,
        member.room_bytes(model),
        facts.memory_bytes_per_s,
        facts.flops,
        facts.disk_bytes_per_s,
        max(1, facts.threads),
    )


class TooTight(NamedTuple):
    """A rank that has no plan, and the memory that would do."""

    rank: int
    least_bytes: int


def _plans(wanted: Sequence[Wanted], parts: Sequence[RankPart]) -> Sequence[Plan] | TooTight:
    """Plans in memory for the longest context with which there are some; else plans that stream."""
    for streaming in (False, True):
        for shorter in wanted:
            made = rank_plans(shorter, parts, streaming=streaming)
            plans = [plan for plan in made if isinstance(plan, Plan)]
            if len(plans) == len(made):
                return plans
    rank, misfit = next((rank, it) for rank, it in enumerate(made) if isinstance(it, Misfit))
    return TooTight(rank, misfit.least_bytes)
