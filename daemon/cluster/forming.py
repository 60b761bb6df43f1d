"""Forms groups: which workers take part in running a model, with which shards and plans.

Knows members and their facts, and how a model can be cut. How a group lives is `group`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from shoal.comm.group.channel import Channel
from shoal.comm.group.wire_types import WireType
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.loading.group_planning import RankSeat, TooTight, rank_plans
from shoal.daemon.loading.grouping import FormedGroup, Seated
from shoal.daemon.sizes import format_bytes
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint, CheckpointShard
from shoal.offload.pack.layout import grains_of
from shoal.offload.pack.manifest import Quant
from shoal.partition.errors import ShardError
from shoal.partition.plan import Plan
from shoal.partition.slicing import Shard, divide

from .group import Group, Seat
from .member import Member
from .roster import Roster

Serving = Callable[[Checkpoint, Quant], Callable[[Channel, Shard], None]]
"""Makes what answers requests for the weights of shards of a checkpoint."""


class Forming:
    """For the head of a cluster. `serving`: how weights are sent."""

    def __init__(self, roster: Roster, serving: Serving, wire: WireType = "f32") -> None:
        self._roster = roster
        self._serving = serving
        self._wire = wire

    def seat(
        self, name: str, checkpoint: Checkpoint, config: NodeConfig, alone: Plan | None, free_bytes: int
    ) -> Seated | None:
        members = self._roster.members
        ranks = config.ranks if config.ranks is not None else len(members) + 1
        if ranks == 1:
            return None
        if ranks > len(members) + 1:
            there = ", ".join(member.name for member in members) or "nobody"
            raise DaemonError(
                "resources",
                f"{ranks} ranks were asked for, and besides this machine there is {there}",
                "see shoal cluster nodes",
            )
        return self._seated(name, checkpoint, config, members[: ranks - 1], free_bytes)

    @property
    def machines(self) -> int:
        return len(self._roster.members) + 1

    @property
    def arrivals(self) -> int:
        return self._roster.arrivals

    def better(self, config: NodeConfig, group: FormedGroup | None) -> bool:
        wanted = len(self._roster.members) + 1
        if config.ranks is not None:
            wanted = min(wanted, config.ranks)
        return wanted > 1 + (len(group.names) if group is not None else 0)

    def _seated(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: NodeConfig,
        members: Sequence[Member],
        free_bytes: int,
    ) -> Seated | None:
        insists = config.ranks is not None
        try:
            shards = divide(checkpoint.spec, len(members) + 1, grains_of(checkpoint, config.quant))
        except ShardError as error:
            if insists:
                raise DaemonError("unsupported", f"{name} cannot be cut that way: {error}") from error
            return None
        parts: list[AnyCheckpoint] = [CheckpointShard(checkpoint, shard) for shard in shards]
        rooms = [free_bytes, *(member.beat.free_bytes or member.facts.memory_bytes for member in members)]
        threads = [config.threads, *(member.facts.threads for member in members)]
        seats = [
            RankSeat(part, replace(config, threads=own), room)
            for part, own, room in zip(parts, threads, rooms, strict=True)
        ]
        plans = rank_plans(seats)
        if isinstance(plans, TooTight):
            if not insists:
                return None
            who = members[plans.rank - 1].name if plans.rank else "this machine"
            raise DaemonError(
                "resources", f"{name}: {who} needs {format_bytes(plans.least_bytes)} for its part"
            )
        group = Group(
            self._roster,
            name,
            [
                Seat(*it)
                for it in zip(members, shards[1:], [p.spec for p in parts[1:]], plans[1:], strict=True)
            ],
            config.quant,
            self._wire,
            self._serving(checkpoint, config.quant),
        )
        group.begin()
        return Seated(parts[0], plans[0], group)
