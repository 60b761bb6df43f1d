"""The machines of a cluster as a profile: what the head knows of those that are attached, and of the links among them.

Pure: from what a daemon answers to a profile. Nothing that other machines said of themselves is believed: what cannot
be true is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from shoal.comm.cluster_messages import LinksReply, NodesReply, NodeStatus
from shoal.partition.errors import ProfileError
from shoal.partition.throughput.peak import PROCESS_BYTES
from shoal.partition.throughput.profile import Device, Profile, ProfileLink
from shoal.partition.throughput.profile_checks import check_profile


class Clustered(NamedTuple):
    """A profile with the machines of a cluster; and those that are left out of it, and why."""

    profile: Profile
    left_out: tuple[str, ...]


def clustered(own: Profile, nodes: NodesReply, links: LinksReply | None = None) -> Clustered:
    """`own`, the profile of a head, with all workers that are attached, and their links. Two speeds are known of a
    worker: if the head was measured, its kernels are taken to be like the head's, so many times as fast. `links`:
    measured just now; how fast all workers together send to the head is known from there."""
    head, left_out = own.head, []
    if nodes.role != "head":
        return Clustered(own, ())
    if links is not None and links.incast_bytes_per_s:
        head = replace(head, port_bytes_per_s=links.incast_bytes_per_s)
    found = Profile((head, *own.devices[1:]), own.links)
    names: dict[str, str] = {nodes.nodes[0].fingerprint: head.name} if nodes.nodes else {}
    for node in nodes.nodes[1:]:
        if not node.attached or node.role != "worker":
            continue
        name = _name(node, [device.name for device in found.devices])
        device = Device(
            name,
            node.memory_bytes + PROCESS_BYTES,  # of a profile's memory the process takes some
            node.memory_bytes_per_s,
            node.flops,
            node.disk_bytes_per_s,
            max(1, node.threads),
        )
        link = ProfileLink((head.name, name), node.rtt_s / 2, node.bytes_per_s)
        try:
            found = check_profile(Profile((*found.devices, device), (*found.links, link)))
        except ProfileError as error:
            left_out.append(f"{node.name} is left out: {error}")
            continue
        if head.measured:
            like = head.like(name, node.memory_bytes_per_s, node.flops, node.disk_bytes_per_s)
            known = replace(like, memory_bytes=device.memory_bytes, threads=device.threads)
            found = replace(found, devices=(*found.devices[:-1], known))
        names[node.fingerprint] = name
    for pair in nodes.pairs:
        ends = [names[it] for it in pair.between if it in names]
        if len(ends) == 2:
            more = ProfileLink((ends[0], ends[1]), pair.rtt_s / 2, pair.bytes_per_s)
            try:
                found = check_profile(replace(found, links=(*found.links, more)))
            except ProfileError as error:
                left_out.append(f"the link of {ends[0]} and {ends[1]} is left out: {error}")
    return Clustered(found, tuple(left_out))


def _name(node: NodeStatus, taken: Sequence[str]) -> str:
    """Machines may be called alike."""
    return node.name if node.name not in taken else f"{node.name} ({node.fingerprint[:8]})"
