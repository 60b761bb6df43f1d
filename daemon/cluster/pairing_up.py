"""Joining and leaving, as a command does it: changes with whom this machine is paired, in the files of its home.

A daemon that runs has to be told to read them anew.
"""

from __future__ import annotations

from shoal.comm.errors import CommError
from shoal.comm.group.dialing import pair
from shoal.comm.group.errors import PairingRefused
from shoal.comm.group.join_code import read_code
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import Peers
from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.private_files import private_dir

from .own_addresses import parse_address

JOIN_S = 10.0


def pair_with_head(home: Home, code: str, address: str | None) -> str:
    """Pairs this machine with the head that gave `code`. → the head's name. Raises DaemonError."""
    private_dir(home.root)
    private_dir(home.cluster)
    try:
        read_code(code)
        peers = Peers(home.cluster)
        _require_free(home, peers)
        if address is None:
            hint = "name it with `address=HOST:PORT`, as shoal cluster init shows it"
            raise DaemonError("bad_request", "the head's address is missing", hint)
        reached = parse_address(address, with_host=True)
        head, _ = pair(NodeIdentity.of(home.cluster), peers, code, [reached], JOIN_S)
    except PairingRefused as error:
        hint = "shoal cluster init on the head gives a code"
        raise DaemonError("bad_request", f"not paired: {error}", hint) from error
    except (CommError, OSError) as error:
        hint = "is shoal serve running on the head, and does its firewall let this port through?"
        raise DaemonError("not_found", f"not paired: {error}", hint) from error
    return head.name


def _require_free(home: Home, peers: Peers) -> None:
    """Raises DaemonError when this machine is a head, or somebody's worker."""
    for peer in peers.listed():
        if peer.role == "head":
            hint = "shoal cluster leave ends that"
            raise DaemonError("bad_request", f"this machine is a worker of {peer.name} already", hint)
    if (home.cluster / "listen").exists() or peers.listed():
        hint = "shoal cluster leave lets go of its workers"
        raise DaemonError("bad_request", "this machine is a head, and a head joins no other", hint)


def unpair(home: Home) -> list[str]:
    """Forgets all that this machine is paired with. → their names"""
    try:
        peers = Peers(home.cluster)
        names = [peer.name for peer in peers.listed()]
        for name in names:
            peers.forget(name)
    except CommError as error:
        raise DaemonError("bad_request", str(error)) from error
    (home.cluster / "listen").unlink(missing_ok=True)
    return names
