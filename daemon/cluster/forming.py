"""Forms groups: which workers take part in running a model, with which shards and plans.

Knows members and their facts, and how a model can be cut. How a group lives is `group`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from typing import NamedTuple, Protocol

from shoal import kernels
from shoal.comm.group.sums.manners import Manner, Manners
from shoal.comm.group.sums.wire_types import WireType
from shoal.daemon.config import NodeConfig
from shoal.daemon.error_codes import refusing
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.kv_files import fingerprint, group_fingerprint
from shoal.daemon.loading.grouping import FormedGroup, Judgement, OwnShare, Seated, Unseated
from shoal.daemon.memory import bounded
from shoal.daemon.throughput.expectation import Together
from shoal.daemon.throughput.model_sizes import weighed
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.offload.pack.manifest import Quant
from shoal.partition.amounts import format_bytes
from shoal.partition.group_choice import Choice, KeptCuts, NoGroup, Places, Split
from shoal.partition.group_search import choose
from shoal.partition.machines import Links, LinkSpeed, Machine
from shoal.partition.plan import Plan, Wanted
from shoal.partition.slicing import Grains, Shard
from shoal.partition.spec import BlockId
from shoal.partition.sum_cost import Means, Network, Topology
from shoal.partition.throughput.profile import Device
from shoal.partition.throughput.weights_of import Weighed

from .choosing.group_question import Question, question
from .choosing.known_machines import known_machines, possible_topologies
from .choosing.measured_groups import MeasuredGroups
from .choosing.planned_cut import PlannedCut, TooTight, planned_cut
from .group import Group, Seat, SendsWeights, Settle
from .member import Member
from .roster import Roster
from .speed import NodeSpeed
from .steady_shares import SteadyShares, UsedCut

log = logging.getLogger(__name__)

ALONE_AS_ASKED = "alone because a number of machines was asked for"


class Serving(Protocol):
    """See `shard_stores.send_weights`."""

    def __call__(self, checkpoint: Checkpoint, quant: Quant, *, bounded: bool) -> SendsWeights: ...


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
        splits: Sequence[Split],
        topologies: Sequence[Topology],
        wires: Sequence[WireType],
        may_cut_vocabulary: bool,
        ranks: int | None,
        kept: KeptCuts,
        measured: Mapping[Places, float],
    ) -> Choice | NoGroup: ...


class Forming:
    """For the head of a cluster. `serving`: how weights are sent. `speed` measures this machine; `device` says what is
    known of it."""

    def __init__(
        self,
        roster: Roster,
        serving: Serving,
        speed: Callable[[], NodeSpeed],
        choosing: Choosing = choose,
        steady: SteadyShares | None = None,
        device: Callable[[], Device | None] = lambda: None,
    ) -> None:
        self._roster = roster
        self._serving = serving
        self._speed = speed
        self._choosing = choosing
        self._steady = steady or SteadyShares()
        self._device = device
        self._measured = MeasuredGroups()

    @property
    def machines(self) -> int:
        return len(self._roster.usable) + 1

    @property
    def arrivals(self) -> int:
        return self._roster.arrivals + self._measured.changes

    def note(
        self, checkpoint: Checkpoint, config: NodeConfig, group: FormedGroup | None, token_s: float
    ) -> None:
        together = group is not None and not group.prompts_only
        machines = frozenset(group.fingerprints) if group is not None and together else frozenset()
        self._measured.note(_model_key(checkpoint, config), machines, token_s)

    def seat(
        self, name: str, checkpoint: Checkpoint, config: NodeConfig, free_bytes: int
    ) -> Seated | Unseated:
        made = self._seating(name, checkpoint, config, free_bytes)
        if made.why:
            log.info("%s: %s", name, made.why)
        if isinstance(made, Unseated):
            return made
        self._steady.use(made.speeds, made.cut)
        group = self._group(name, checkpoint, config, made)
        group.begin()
        if made.share is None:
            return Seated(made.parts[0], made.plans[0], group, made.why, together=made.together)
        share = OwnShare(made.parts[0], made.share)
        return Seated(checkpoint, made.plans[0], group, made.why, share, made.together)

    def prepare(self, name: str, checkpoint: Checkpoint, config: NodeConfig, free_bytes: int) -> None:
        made = self._seating(name, checkpoint, config, free_bytes)
        if isinstance(made, Unseated):
            return
        with refusing(name), open_checkpoint(checkpoint.path) as again:  # a loaded model's is closed
            self._group(name, again, config, made).fetch()

    def _group(self, name: str, checkpoint: Checkpoint, config: NodeConfig, made: _Seating) -> Group:
        kv_store = b""
        own = made.share or made.plans[0]
        if config.kv_disk_bytes != 0:
            computing = [
                *(["prompts only"] if made.share is not None else []),
                config.cluster_wire,
                kernels.home(),
                *(member.facts.kernels for member in made.members),
            ]
            whole = fingerprint(checkpoint, config.quant, made.plans[0])
            kv_store = group_fingerprint(whole, made.shards, computing)
        return Group(
            self._roster,
            name,
            [
                Seat(made.members[rank - 1], made.shards[rank], made.parts[rank].spec, made.plans[rank])
                for rank in range(1, len(made.shards))
            ],
            config.quant,
            self._serving(checkpoint, config.quant, bounded=bounded(config.memory_bytes)),
            own.weights_bytes,
            self._settling(config, made, checkpoint.spec.hidden),
            kv_store,
            [shard.ranges.kv_heads for shard in made.shards],
            prompts_only=made.share is not None,
        )

    def would_seat(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: NodeConfig,
        free_bytes: int,
        dropping: Collection[str],
    ) -> bool:
        return isinstance(self._seating(name, checkpoint, config, free_bytes, dropping), _Seating)

    def _seating(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: NodeConfig,
        free_bytes: int,
        dropping: Collection[str] = (),
    ) -> _Seating | Unseated:
        """Who would take part, and how."""
        awaited = self._roster.awaited(0 if config.ranks is None else config.ranks - 1)
        members = _in_order(awaited)
        if config.ranks is not None and config.ranks > len(members) + 1:
            there = " and ".join(member.name for member in members) or "nobody"
            message = f"{config.ranks} ranks were asked for, and besides this machine there is {there}"
            message += "".join(f"; {absent}" for absent in self._roster.absent)
            for member in self._roster.members:
                if left_s := self._roster.faults.left_s(member.fingerprint):
                    message += f"; {member.name} did not take its part lately and is not asked for {left_s:.0f} s more"
            raise DaemonError("resources", message, "see shoal cluster nodes")
        if not members or config.ranks == 1:
            return Unseated(ALONE_AS_ASKED if members else "")
        rooms = [free_bytes, *(member.room_bytes(name, *dropping) for member in members)]
        choice = self._choice(checkpoint, config, members, rooms)
        if isinstance(choice, NoGroup):
            if config.ranks is not None:
                raise DaemonError("resources", f"{name}: {choice.describe()}")
            return Unseated(choice.describe())
        if len(choice.ranks) == 1:
            return Unseated(choice.describe())
        cut = self._best_cut(checkpoint, config, choice, members, rooms)
        made = self._planned(name, _model_key(checkpoint, config), config, members, cut)
        if isinstance(made, Unseated):
            return made
        expected = self._question(checkpoint, config, members, rooms).expected(cut.choice)
        return made._replace(together=expected)

    def better(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: NodeConfig,
        group: FormedGroup | None,
        free_bytes: int,
    ) -> Judgement:
        members = _in_order(self._roster.usable)
        if not members:
            return Judgement(group is not None, "")
        rooms = [free_bytes, *(member.room_bytes(name) for member in members)]
        choice = self._choice(checkpoint, config, members, rooms)
        if isinstance(choice, NoGroup):
            return Judgement(False, choice.describe())
        if len(choice.ranks) > 1 and _differs(choice, group):  # what was chosen may not fit, to the byte
            cut = self._best_cut(checkpoint, config, choice, members, rooms)
            if isinstance(cut.plans, TooTight):
                return Judgement(False, _lack(name, cut.plans, _chosen(cut.choice, members)))
            choice = cut.choice
        return Judgement(_differs(choice, group), choice.describe())

    def _choice(
        self,
        checkpoint: Checkpoint,
        config: NodeConfig,
        members: Sequence[Member],
        rooms: Sequence[int],
        *,
        steady: bool = True,
    ) -> Choice | NoGroup:
        """`rooms`: bytes of memory, this machine's first. `steady`: the last cut, if it is nearly as good."""
        model, there = _model_key(checkpoint, config), [member.fingerprint for member in members]
        asked = self._question(checkpoint, config, members, rooms)
        return self._choosing(
            asked.wanted,
            asked.model.extents,
            asked.machines,
            asked.links,
            grains=asked.grains,
            splits=asked.splits,
            topologies=asked.topologies,
            wires=asked.wires,
            may_cut_vocabulary=asked.may_cut_vocabulary,
            ranks=config.ranks,
            kept=self._steady.cuts(model, there) if steady else KeptCuts(),
            measured=self._measured_at(model, there),
        )

    def _question(
        self, checkpoint: Checkpoint, config: NodeConfig, members: Sequence[Member], rooms: Sequence[int]
    ) -> Question:
        model = weighed(checkpoint, config.quant)
        machines = self._machines(config, members, rooms, model)
        return question(checkpoint, config, model, machines, members, self._roster.pairs.between)

    def _speeds(self, members: Sequence[Member]) -> Mapping[str, NodeSpeed]:
        """Those that count, by fingerprint; this machine's is ''."""
        return self._steady.speeds({"": self._speed()} | {it.fingerprint: it.speed for it in members})

    def _measured_at(self, model: str, there: Sequence[str]) -> Mapping[Places, float]:
        """What is known of groups of these members, by their places."""
        places = {fingerprint: place for place, fingerprint in enumerate(there, 1)}
        return {
            (0, *sorted(places[it] for it in machines)): token_s
            for machines, token_s in self._measured.token_s(model).items()
            if machines <= places.keys()
        }

    def _machines(
        self,
        config: NodeConfig,
        members: Sequence[Member],
        rooms: Sequence[int],
        model: Weighed | None = None,
    ) -> list[Machine]:
        speeds, threads = self._speeds(members), config.thread_count
        return known_machines(self._device(), members, rooms, threads, speeds, model, config.kv_type)

    def _settling(self, config: NodeConfig, seating: _Seating, hidden: int) -> Settle:
        """What decides how sums are made, once the members have met and their links are measured."""
        chosen, plan = seating.members, seating.plans[0]
        machines = self._machines(config, chosen, [it.peak_bytes for it in seating.plans])
        means = [Means(*each) for each in product(possible_topologies(chosen), config.wires)]

        def settle(between: Mapping[tuple[int, int], LinkSpeed]) -> Manners:
            links = {(0, rank): member.link for rank, member in enumerate(chosen, 1)} | dict(between)
            network = Network(machines, links, range(len(machines)))
            found = network.plan(means, plan.part_tokens, hidden)
            if found is None:
                return Manners()
            return Manners(Manner(*found.few), Manner(*found.many), found.many_rows)

        return settle

    def _planned(
        self, name: str, model: str, config: NodeConfig, members: Sequence[Member], cut: PlannedCut
    ) -> _Seating | Unseated:
        chosen, choice = _chosen(cut.choice, members), cut.choice
        if isinstance(cut.plans, TooTight):
            said = _lack(name, cut.plans, chosen)
            if config.ranks is not None:
                raise DaemonError("resources", said)
            return Unseated(said)
        used = UsedCut(
            model,
            tuple(member.fingerprint for member in chosen),
            choice.shares,
            choice.experts,
            tuple(member.fingerprint for member in members),
            choice.split,
        )
        speeds = self._speeds(members)
        return _Seating(chosen, used, speeds, cut.shards, cut.parts, cut.plans, choice.describe(), cut.share)

    def _best_cut(
        self,
        checkpoint: Checkpoint,
        config: NodeConfig,
        choice: Choice,
        members: Sequence[Member],
        rooms: Sequence[int],
    ) -> PlannedCut:
        """What was chosen as it can be carried out. If that does not fit, streams or cuts the vocabulary, and may
        be a cut that was kept, another one that is better."""
        cut = self._cut(checkpoint, config, choice, members, rooms)
        if cut.streamed_bytes or cut.cuts_vocabulary:
            afresh = self._choice(checkpoint, config, members, rooms, steady=False)
            if not isinstance(afresh, NoGroup) and len(afresh.ranks) > 1:
                other = self._cut(checkpoint, config, afresh, members, rooms)
                if other.is_better(cut):
                    return other
        return cut

    @staticmethod
    def _cut(
        checkpoint: Checkpoint,
        config: NodeConfig,
        choice: Choice,
        members: Sequence[Member],
        rooms: Sequence[int],
    ) -> PlannedCut:
        chosen = _chosen(choice, members)
        threads = [config.thread_count, *(member.facts.threads for member in chosen)]
        own_rooms = [rooms[rank.place] for rank in choice.ranks]
        may_cut = all(member.divides_vocabulary for member in chosen)
        return planned_cut(checkpoint, config, choice, own_rooms, threads, may_cut_vocabulary=may_cut)


class _Seating(NamedTuple):
    """A group that could be formed: members by rank, this machine not among them; the rest for all ranks."""

    members: Sequence[Member]
    cut: UsedCut
    speeds: Mapping[str, NodeSpeed]  # that it was chosen by
    shards: Sequence[Shard]
    parts: Sequence[CheckpointShard]
    plans: Sequence[Plan]
    why: str
    share: Plan | None = None  # of this machine, if the first of the plans is that of the whole model
    together: Together | None = None


def _differs(choice: Choice, group: FormedGroup | None) -> bool:
    """Whether others are to compute than do now, or otherwise."""
    now, prompts_only = (sorted(group.names), group.prompts_only) if group is not None else ([], False)
    return (sorted(it.machine for it in choice.ranks[1:]), choice.split == "prompts") != (now, prompts_only)


def _lack(name: str, found: TooTight, others: Sequence[Member]) -> str:
    """Why a cut has no plans, in words. `others`: the ranks beside this machine."""
    who = others[found.rank - 1].name if found.rank else "this machine"
    return f"{who} needs {format_bytes(found.least_bytes)} for its part of {name}"


def _model_key(checkpoint: Checkpoint, config: NodeConfig) -> str:
    return f"{checkpoint.path} {config.quant}"


def _chosen(choice: Choice, members: Sequence[Member]) -> list[Member]:
    """By rank, this machine not among them."""
    return [members[rank.place - 1] for rank in choice.ranks[1:]]


def _in_order(members: Sequence[Member]) -> list[Member]:
    """Not in the order in which they came: each is to get the shard again that it has the weights and the KV of."""
    return sorted(members, key=lambda member: member.fingerprint)
