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
        for peer in peers.listed():
            raise DaemonError(
                "bad_request",
                f"this machine is paired with {peer.name} already",
                "shoal cluster leave ends that",
            )
        if address is None:
            raise DaemonError(
                "bad_request", "the head was not found on the local network", "name its `address`"
            )
        head, _ = pair(NodeIdentity.of(home.cluster), peers, code, [parse_address(address)], JOIN_S)
    except PairingRefused as error:
        hint = "shoal cluster init on the head gives a code"
        raise DaemonError("bad_request", f"not paired: {error}", hint) from error
    except (CommError, OSError) as error:
        raise DaemonError("not_found", f"not paired: {error}") from error
    return head.name


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
