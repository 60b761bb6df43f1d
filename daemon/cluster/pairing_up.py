"""Joining and leaving, as a command does it: changes with whom this machine is paired, in the files of its home.

A daemon that runs has to be told to read them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from shoal.comm.errors import CommError
from shoal.comm.group.dialing import dial, pair
from shoal.comm.group.discovery import BROWSE_S, SERVICE, FoundHead, addresses_of
from shoal.comm.group.errors import Forgotten, NotPaired, PairingRefused
from shoal.comm.group.join_code import read_code
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import PairedNode, Peers
from shoal.comm.group.streams import Address
from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.private_files import private_dir
from shoal.partition.amounts import counted

from .routes.local_network import LocalNetwork, interfaces
from .routes.own_addresses import parse_address

JOIN_S = 10.0
KNOWN_S = 5.0  # until a head has said whether it still knows this machine
A_CODE = "shoal cluster init on the head gives a code"
NAME_IT = "name its `address=HOST:PORT`, which shoal cluster init shows on the head"


class NowPaired(NamedTuple):
    """`fingerprint` is this machine's own. `before`: it was paired already."""

    head: str
    fingerprint: str
    before: bool


def pair_with_head(
    home: Home,
    code: str,
    addresses: Sequence[str] = (),
    head: str | None = None,
    network: LocalNetwork | None = None,
) -> NowPaired:
    """Pairs this machine with the head that gave `code`, at one of `addresses` or wherever on `network` it is. If it is
    paired already with the head whose fingerprint is `head`, it stays so, unless that head says that it has forgotten
    it. Raises DaemonError."""
    private_dir(home.root)
    private_dir(home.cluster)
    said, hint = "", "is shoal serve running on the head, and does its firewall let this port through?"
    _check_code(code)
    try:
        peers = Peers(home.cluster)
        identity = NodeIdentity.of(home.cluster)
        places = [parse_address(it, with_host=True) for it in addresses]
        kept = next((it for it in peers.listed() if it.role == "head" and it.fingerprint == head), None)
        if kept is None:
            _require_free(home, peers)
        elif not _forgotten(identity, peers, kept, places):
            return NowPaired(kept.name, identity.fingerprint, before=True)
        if not places:
            heads = _found(network or LocalNetwork())
            said = f"{counted(len(heads), 'head')} answered on the local network, and "
            hint = f"does the head's firewall let this port through? If so, {NAME_IT}"
            places = addresses_of(heads)
        found, _ = pair(identity, peers, code, places, JOIN_S)
        if kept is not None and kept.fingerprint != found.fingerprint:  # another head gave the code
            peers.forget(kept.fingerprint)
    except PairingRefused as error:
        hint = A_CODE
        if said:  # another head may have refused it
            hint += f"; if it is a good one, {NAME_IT}"
        raise DaemonError("not_found", f"not paired: {error}", hint) from error
    except (CommError, OSError) as error:
        raise DaemonError("not_found", f"not paired: {said}{error}", hint) from error
    return NowPaired(found.name, identity.fingerprint, before=False)


def _check_code(code: str) -> None:
    """Raises DaemonError unless it may be one."""
    try:
        read_code(code)
    except PairingRefused as error:
        raise DaemonError("bad_request", f"not paired: {error}", A_CODE) from error


def _forgotten(identity: NodeIdentity, peers: Peers, head: PairedNode, places: Sequence[Address]) -> bool:
    """Whether `head` itself, which has proved who it is, says that it knows this machine no longer."""
    try:
        dial(identity, peers, head.fingerprint, "measure", [*places, *head.addresses], KNOWN_S).close()
    except Forgotten:
        return True
    except (CommError, OSError):  # it is away: who is paired with it looks for it
        pass
    return False


def _found(network: LocalNetwork) -> list[FoundHead]:
    """Who says that it is a head. Which of them is the right one, the code proves."""
    try:
        heads = network.find()
    except OSError as error:
        found = f"heads cannot be looked for on the local network: {error}"
        raise DaemonError("not_found", found, NAME_IT) from error
    if not heads:
        looked = (
            f"no head was found on the local network: {SERVICE} was looked for by mDNS for {BROWSE_S:.0f} s"
        )
        raise DaemonError("not_found", f"{looked} at {', '.join(interfaces())}", NAME_IT)
    return heads


def _require_free(home: Home, peers: Peers) -> None:
    """Raises DaemonError when this machine is a head, or somebody's worker."""
    for peer in peers.listed():
        if peer.role == "head":
            hint = "shoal cluster leave ends that"
            raise DaemonError("bad_request", f"this machine is a worker of {peer.name} already", hint)
    if (home.cluster / "listen").exists() or peers.listed():
        hint = "shoal cluster leave lets go of its workers"
        raise DaemonError("bad_request", "this machine is a head, and a head joins no other", hint)


class Unpaired(NamedTuple):
    """`nodes`: with whom this machine was paired; `led`: whether it was a head, which may have had no workers."""

    nodes: list[PairedNode]
    led: bool


def unpair(home: Home) -> Unpaired:
    """Forgets all that this machine is paired with; who leaves by himself meanwhile is not among it. Raises
    DaemonError."""
    listen = home.cluster / "listen"
    led = listen.exists()
    nodes: list[PairedNode] = []
    try:
        peers = Peers(home.cluster)
        for node in peers.listed():
            with suppress(NotPaired):
                nodes.append(peers.forget(node.fingerprint))
    except CommError as error:
        raise DaemonError("bad_request", str(error)) from error
    listen.unlink(missing_ok=True)
    return Unpaired(nodes, led)
