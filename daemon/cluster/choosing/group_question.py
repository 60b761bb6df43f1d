"""What is asked of `group_search` for a checkpoint and machines that are there, and what is predicted of its choice.

Knows how machines and links are told to the search. Who takes part, and what is made of the choice, is `forming`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import NamedTuple

from shoal.comm.group.sums.wire_types import WireType
from shoal.daemon.cluster.member import Member
from shoal.daemon.config import NodeConfig
from shoal.daemon.loading.planning import wanted_of
from shoal.daemon.throughput.expectation import Together
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.offload.pack.layout import grains_of
from shoal.partition.group_choice import Choice, Split
from shoal.partition.group_cuts import group_steps
from shoal.partition.machines import Links, LinkSpeed, Machine, link_between
from shoal.partition.plan import Plan, Wanted, plan_in_ram
from shoal.partition.slicing import Grains
from shoal.partition.sum_cost import Means, Topology
from shoal.partition.throughput.alone import usual_job
from shoal.partition.throughput.group_plans import Groups
from shoal.partition.throughput.profile import Device, Profile, ProfileLink
from shoal.partition.throughput.rank_laws import RankLaws
from shoal.partition.throughput.weights_of import Weighed

from .known_machines import possible_splits, possible_topologies


class Question(NamedTuple):
    """`machines`, this one first, with links by their places. The rest as `choose` takes it."""

    model: Weighed
    wanted: Wanted
    machines: Sequence[Machine]
    links: Links
    grains: Grains
    splits: Sequence[Split]
    topologies: Sequence[Topology]
    wires: Sequence[WireType]
    may_cut_vocabulary: bool

    def expected(self, choice: Choice) -> Together | None:
        """What is predicted of a group that was chosen; None if its cut cannot be made any more."""
        means = [Means(*each) for each in product(self.topologies, self.wires)]
        steps = group_steps(
            choice,
            self.wanted,
            self.model.extents,
            self.machines,
            self.links,
            means,
            self.grains,
            may_cut_vocabulary=self.may_cut_vocabulary,
        )
        if steps is None:
            return None
        job = usual_job(self.wanted.context_tokens)
        groups = Groups(self.model, self.wanted, self._profile(choice), job, self.wires)
        return Together(groups.cost(choice), steps, choice.split == "prompts")

    def _profile(self, choice: Choice) -> Profile:
        """Of the machines that were chosen. This one is known to all others by a link."""
        chosen = [self.machines[rank.place] for rank in choice.ranks]
        links = (link_between(self.links, 0, rank.place) for rank in choice.ranks[1:])
        between = (
            ProfileLink((chosen[0].name, machine.name), link.latency_s, link.bytes_per_s)
            for machine, link in zip(chosen[1:], links, strict=True)
            if link is not None
        )
        return Profile(tuple(map(_device, chosen)), tuple(between))


def question(
    checkpoint: Checkpoint,
    config: NodeConfig,
    model: Weighed,
    machines: Sequence[Machine],
    members: Sequence[Member],
    between: Callable[[Member, Member], LinkSpeed | None],
) -> Question:
    """Of this machine and the members. `between`: the link of two members, if they have one."""
    links = {(0, place): member.link for place, member in enumerate(members, 1)}
    for (one, near), (other, far) in combinations(enumerate(members, 1), 2):
        if (link := between(near, far)) is not None:
            links[one, other] = link
    # If no context was asked for, a shorter one may keep it in memory alone: that is what groups are compared with.
    contexts, room = wanted_of(checkpoint.spec, config), machines[0].memory_bytes
    resident = (it for it in contexts if isinstance(plan_in_ram(it, model.extents, memory_bytes=room), Plan))
    return Question(
        model,
        next(resident, contexts[0]),
        machines,
        links,
        grains_of(checkpoint, config.quant),
        possible_splits(members),
        possible_topologies(members),
        config.wires,
        all(member.divides_vocabulary for member in members),
    )


def _device(machine: Machine) -> Device:
    """As its tables say, or its two speeds."""
    laws = machine.laws
    if isinstance(laws, RankLaws):
        return replace(laws.device, name=machine.name, memory_bytes=float(machine.memory_bytes))
    return Device(
        machine.name,
        machine.memory_bytes,
        machine.memory_bytes_per_s,
        machine.flops,
        machine.disk_bytes_per_s,
        machine.threads,
    )
