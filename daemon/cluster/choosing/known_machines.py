"""What this head knows of the machines that a group may be made of: two speeds of each, and tables of their kernels.

A worker says what its tables are, if it was measured. One that was not is taken to be like this machine, as many times
as fast at reading weights and at computing as its two speeds say (`Device.like`). Where this machine has no tables,
nobody's count: they would be compared with guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal.daemon.cluster.member import Member
from shoal.daemon.cluster.speed import NodeSpeed
from shoal.partition.group_choice import Split
from shoal.partition.group_search import AVAILABLE_SPLITS, AVAILABLE_TOPOLOGIES
from shoal.partition.machines import Machine, PartLaws
from shoal.partition.sum_cost import Topology
from shoal.partition.throughput.profile import Device
from shoal.partition.throughput.rank_laws import RankLaws
from shoal.partition.throughput.weights_of import Weighed


def known_machines(
    own: Device | None,
    members: Sequence[Member],
    rooms: Sequence[int],
    threads: int,
    speeds: Mapping[str, NodeSpeed],
    model: Weighed | None = None,
    kv_type: str = "f16",
) -> list[Machine]:
    """This machine, on so many threads, and the members. `own`: what is known of it. `rooms`: bytes of memory of each.
    `speeds`: by fingerprint; this machine's is ''. `model`: what they are to compute; without it nobody's tables
    count."""
    device = own.on(threads) if own is not None and own.measured and own.products else None
    found = [_machine("this machine", rooms[0], threads, speeds[""], _laws(device, model, kv_type))]
    for member, room in zip(members, rooms[1:], strict=True):
        speed, its = speeds[member.fingerprint], None
        if device is not None:
            its = member.device or _alike(device, member.name, speed)
        count = max(1, member.facts.threads)
        found.append(_machine(member.name, room, count, speed, _laws(its, model, kv_type)))
    return found


def _alike(device: Device, name: str, speed: NodeSpeed) -> Device | None:
    """None if it says nothing of its speeds."""
    if min(speed.memory_bytes_per_s, speed.flops) <= 0:
        return None
    return device.like(name, speed.memory_bytes_per_s, speed.flops, speed.disk_bytes_per_s)


def _machine(name: str, room: int, threads: int, speed: NodeSpeed, laws: PartLaws | None) -> Machine:
    return Machine(
        name, room, speed.memory_bytes_per_s, speed.flops, speed.disk_bytes_per_s, threads, laws=laws
    )


def _laws(device: Device | None, model: Weighed | None, kv_type: str) -> PartLaws | None:
    return RankLaws(device, model, kv_type) if device is not None and model is not None else None


def possible_splits(members: Sequence[Member]) -> Sequence[Split]:
    """What all of them can do."""
    pages = all(member.exchanges_pages for member in members)
    return [split for split in AVAILABLE_SPLITS if split != "prompts" or pages]


def possible_topologies(members: Sequence[Member]) -> Sequence[Topology]:
    """What all of them can do."""
    return AVAILABLE_TOPOLOGIES if all(member.meets_fellows for member in members) else ("star",)
