"""What `shoal doctor` says about the cluster: is this machine in one, do the others reach it, and what is in the way.

`findings` is pure: from what the daemon and the system say to what people should know and do.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from shoal.client import Client
from shoal.comm.cluster_messages import NodesReply, NodeStatus
from shoal.comm.errors import CommError
from shoal.comm.home import Home
from shoal.daemon.cluster.routes.surroundings import Firewall, Surroundings, look_around, role_of

from .. import background
from ..terminal.link_text import link_text
from .finding import Finding

NODES_S = 1.5
_PORT = "7447"
_KINDS = {"wifi": "Wi-Fi", "mobile": "a mobile link", "vpn": "a VPN"}
_UPDATE = (
    "on the older machine: pip install . in a newer copy of Shoal, then shoal stop and shoal serve --detach"
)
_NOT_THE_HEAD = (
    "see whether the address is still the head's (there: shoal serve --detach, then shoal doctor); if shoal cluster"
    " nodes there does not list this machine: shoal cluster leave here, then shoal cluster join with a new code"
)
_REMEDIES = {  # for a worker whose trouble has these words
    "pair them again": "shoal cluster leave, then shoal cluster join with a new code",
    "update the older": _UPDATE,
    # Not the head's words: anybody can answer so who has its address.
    "not the paired one": _NOT_THE_HEAD,
    "not proved": _NOT_THE_HEAD,
}
_OPEN: dict[Firewall, tuple[str, str]] = {  # for heads, who listen; and for workers, who only look for them
    "ufw": ("sudo ufw allow {port}/tcp && sudo ufw allow 5353/udp", "sudo ufw allow 5353/udp"),
    "firewalld": (
        "sudo firewall-cmd --permanent --add-port={port}/tcp --add-service=mdns && sudo firewall-cmd --reload",
        "sudo firewall-cmd --permanent --add-service=mdns && sudo firewall-cmd --reload",
    ),
    "macos": (
        "System Settings → Network → Firewall → Options: allow incoming connections to python",
        "System Settings → Network → Firewall → Options: allow incoming connections to python",
    ),
}


def look_at_cluster(home: Home) -> Iterator[Finding]:
    """Raises DaemonError."""
    role, head = role_of(home.cluster)
    if role == "alone":
        yield Finding("cluster", "ok", "this machine is in none")
        return
    if background.running_pid(home) is None:
        lent = f"it is lent to {head}, but" if head else "it is a head, but"
        yield Finding("cluster", "note", f"{lent} no daemon runs here", "shoal serve --detach")
        yield from findings(NodesReply(role=role, nodes=[]), look_around([], {}))
        return
    try:
        with Client(home.address, timeout_s=NODES_S) as client:
            reply = client.nodes()
    except CommError as error:
        yield Finding("cluster", "note", f"the daemon says nothing about it: {error}", "shoal logs")
        return
    others = {node.name: node.address for node in reply.nodes[1:] if node.attached and node.address}
    yield from findings(reply, look_around(reply.listening, others))


def findings(reply: NodesReply, around: Surroundings) -> Iterator[Finding]:
    """Without nodes in `reply` no daemon runs."""
    others = [node for node in reply.nodes[1:] if node.attached]
    if reply.nodes:
        yield _place(reply, others)
    if not others and all(one.kind == "loopback" for one in around.addresses):
        found = "no interface but loopback is up: there are no other machines"
        yield Finding("network", "note", found, "plug a cable in, or connect to a Wi-Fi")
        return
    if reply.role == "head" and reply.nodes:
        yield from _listening(reply, around, others)
    yield from _system(reply, around, others)
    yield from _multicast(around)
    yield from _interfaces(around)
    yield from _versions(reply, others)


def _place(reply: NodesReply, others: list[NodeStatus]) -> Finding:
    """Who this machine is in the cluster."""
    if reply.role == "head":
        known = len(reply.nodes) - 1
        if not known:
            return Finding(
                "cluster", "note", "head of no machine yet", "shoal cluster init shows how one joins"
            )
        found = f"head; {len(others)} of {known} machine{'s' * (known != 1)} attached"
        if preparing := [node.name for node in reply.nodes[1:] if node.preparing]:
            found += f", preparing: {', '.join(preparing)}"
        if away := [node.name for node in reply.nodes[1:] if not (node.attached or node.preparing)]:
            mend = f"shoal serve --detach there, or for good: shoal cluster forget {shlex.quote(away[0])}"
            return Finding("cluster", "note", f"{found}, away: {', '.join(away)}", mend)
        return Finding("cluster", "ok", found)
    head = next((node for node in reply.nodes[1:] if node.role == "head"), None)
    if head is None:
        return Finding("cluster", "ok", reply.role)
    if head.attached:
        return Finding("cluster", "ok", f"lent to {head.name} at {head.address} ({link_text(head)})")
    if reply.nodes[0].preparing:
        found = f"lent to {head.name}, but not attached yet: it tests its kernels and measures itself first"
        return Finding("cluster", "ok", found)
    trouble = reply.nodes[0].trouble or "it does not answer"
    open_there = "on the head: shoal serve --detach, then shoal doctor, which says whether its port is open"
    mend = next((mend for said, mend in _REMEDIES.items() if said in trouble), open_there)
    return Finding("cluster", "note", f"lent to {head.name}, but not attached: {trouble}", mend)


def _listening(reply: NodesReply, around: Surroundings, others: list[NodeStatus]) -> Iterator[Finding]:
    if not reply.listening and reply.closed:
        found = "closed: no machine may come that is not there"
        yield Finding("port", "ok", found)
        return
    if not reply.listening:
        found = "this head does not listen for other machines; shoal logs shows why"
        yield Finding("port", "broken", found, "shoal cluster init --listen auto:7448")
        return
    port = _port(reply)
    for text, trouble in around.closed.items():
        mend = f"let port {port} TCP through the firewall of this machine"
        yield Finding("port", "note", f"{text} cannot be reached even from here: {trouble}", mend)
    loopback = {one.host for one in around.addresses if one.kind == "loopback"} | {"127.0.0.1", "::1"}
    outside = [text for text in around.tried if _host(text) not in loopback]
    if not outside and not others:
        found = f"listens at {', '.join(reply.listening)} only, where no other machine reaches it"
        yield Finding("port", "note", found, "shoal cluster init --listen auto")
    elif good := [text for text in outside or around.tried if text not in around.closed]:
        yield Finding("port", "ok", f"answers at {', '.join(good)}")


def _system(reply: NodesReply, around: Surroundings, others: list[NodeStatus]) -> Iterator[Finding]:
    head = reply.role == "head"
    port = _port(reply)
    for wall in around.firewalls:
        if others:  # it is open
            continue
        ports = f"{port} TCP and 5353 UDP have" if head else "5353 UDP has"
        found = f"{wall} is on: {ports} to be open" + ("" if head else " (or join with --address)")
        yield Finding("firewall", "note", found, _OPEN[wall][0 if head else 1].format(port=port))
    if around.behind_nat:
        if head:
            found = "WSL2 behind NAT: other machines reach neither this one nor its multicast"
            mend = (
                "networkingMode=mirrored under [wsl2] in %UserProfile%\\.wslconfig, then wsl --shutdown;"
                f" and open port {port} TCP in the firewall of Windows"
            )
            yield Finding("wsl2", "note", found, mend)
        else:
            found = "WSL2 behind NAT: heads are not found by themselves; attaching works"
            yield Finding("wsl2", "ok" if others else "note", found, "" if others else "join with --address")
    trouble = reply.nodes[0].trouble if reply.nodes else ""
    deaf = around.multicast and all(around.multicast.values())
    if around.system == "macos" and not others and (deaf or "no route to host" in trouble.lower()):
        found = "macOS may keep programs from the local network"
        mend = "System Settings → Privacy & Security → Local Network: allow your terminal"
        yield Finding("permission", "note", found, mend)


def _multicast(around: Surroundings) -> Iterator[Finding]:
    if heard := [host for host, trouble in around.multicast.items() if not trouble]:
        yield Finding("multicast", "ok", f"works at {', '.join(heard)}")
    for host, trouble in around.multicast.items():
        if trouble:
            mend = "let port 5353 UDP through the firewall, or join with --address"
            yield Finding("multicast", "note", f"does not work at {host}: {trouble}", mend)
    if not around.multicast:
        found = "no interface that has it: heads are not found by themselves"
        yield Finding("multicast", "note", found, "plug a cable in, or join with --address")


def _interfaces(around: Surroundings) -> Iterator[Finding]:
    """A slow link is used although a cable is there."""
    cable = next((one for one in around.addresses if one.kind == "cable"), None)
    for name, own in around.used.items():
        if cable is not None and own.kind in _KINDS:
            found = f"{name} is reached over {_KINDS[own.kind]} ({own.interface}), although {cable.interface} is up"
            mend = f"connect {name} by cable to the same network, then on the worker: shoal stop, shoal serve --detach"
            yield Finding("interface", "note", found, mend)


def _versions(reply: NodesReply, others: list[NodeStatus]) -> Iterator[Finding]:
    for node in others:
        if node.version and node.version != reply.nodes[0].version:
            found = f"{node.name} runs Shoal {node.version}, this machine {reply.nodes[0].version}"
            yield Finding("versions", "note", found, _UPDATE)


def _host(text: str) -> str:
    return text.rpartition(":")[0].strip("[]")


def _port(reply: NodesReply) -> str:
    return reply.listening[0].rpartition(":")[2] if reply.listening else _PORT
