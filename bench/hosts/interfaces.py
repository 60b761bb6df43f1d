"""Two machines with a slow cable, a fast one behind it, and interfaces that lead nowhere: which way do they take?"""

from __future__ import annotations

from hosts.group import Group
from hosts.host import Host
from hosts.lab import Lab
from hosts.network import ip

SLOW_BYTES_PER_S = 1.25e6
DOCKER, VPN, LINK_LOCAL = "172.17.0.1/16", "10.8.0.{}/24", "169.254.7.{}/16"


def two_ways(lab: Lab) -> tuple[Group, tuple[str, str]]:
    """A head and a worker that found it, and how the fast network's addresses begin."""
    fast = lab.network()
    hosts = [lab.host(name, lan=False) for name in ("head", "worker")]
    for number, host in enumerate(hosts, 1):
        lab.plug(host, bytes_per_s=SLOW_BYTES_PER_S)
        lab.plug(host, fast)
        decoys(host, number)
    return Group(hosts[0], hosts[1:]), fast.prefixes


def decoys(host: Host, number: int) -> None:
    """As Docker and a VPN make them; the same address on every machine, or one that no other machine can reach."""
    inside = host.namespace
    ip("link", "add", "docker0", "type", "bridge", inside=inside)
    ip("addr", "add", DOCKER, "dev", "docker0", inside=inside)
    ip("tuntap", "add", "dev", "tun0", "mode", "tun", inside=inside)
    ip("addr", "add", VPN.format(number), "dev", "tun0", inside=inside)
    ip("addr", "add", LINK_LOCAL.format(number), "dev", host.cables[0].interface, inside=inside)
    for name in ("docker0", "tun0"):
        ip("link", "set", name, "up", inside=inside)
