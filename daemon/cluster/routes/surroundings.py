"""What stands between this machine and the others of its cluster: interfaces, firewalls, multicast, the system's ways.

Says what is so. What it means for people, and what to do, is said where it is shown.
"""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shoal.comm.cluster_messages import NodeRole
from shoal.comm.errors import CommError
from shoal.comm.group.multicast import hears_itself
from shoal.comm.group.peers import Peers
from shoal.daemon.errors import DaemonError

from .own_addresses import OwnAddress, own_addresses, parse_address, reachable, towards

OWN_CONNECT_S = 0.5
SYSTEM_TOOL_S = 1.0
MOST_ADDRESSES = 32
WITH_MULTICAST = ("cable", "wifi", "link-local")

System = Literal["linux", "wsl2", "macos", "other"]
Firewall = Literal["ufw", "firewalld", "macos"]


@dataclass(frozen=True)
class Surroundings:
    """`multicast`: for each address why the machine does not hear itself there, or "". `closed`: the addresses at which
    it listens and yet cannot be reached by itself, and why. `used`: for each other machine the own address that leads
    to it."""

    system: System = "linux"
    behind_nat: bool = False
    addresses: tuple[OwnAddress, ...] = ()
    firewalls: tuple[Firewall, ...] = ()
    multicast: Mapping[str, str] = field(default_factory=dict)
    tried: tuple[str, ...] = ()
    closed: Mapping[str, str] = field(default_factory=dict)
    used: Mapping[str, OwnAddress] = field(default_factory=dict)


def role_of(directory: Path) -> tuple[NodeRole, str]:
    """What this machine is by the files below its home, and the head's name if it is a worker. Raises DaemonError."""
    try:
        peers = Peers(directory).listed()
    except CommError as error:
        raise DaemonError("bad_request", str(error)) from error
    if head := next((peer.name for peer in peers if peer.role == "head"), ""):
        return "worker", head
    return ("head", "") if (directory / "listen").exists() else ("alone", "")


def look_around(listening: Sequence[str], others: Mapping[str, str]) -> Surroundings:
    """`listening`: where, as HOST:PORT. `others`: names of other machines, and where they are.

    Takes about a second.
    """
    addresses = tuple(own_addresses())
    asked: dict[str, str] = {}
    for one in sorted(addresses, key=lambda one: one.version):  # by IPv6 only where there is no IPv4
        if one.kind in WITH_MULTICAST and one.interface not in asked.values():
            asked[one.host] = one.interface
    tried = tuple(reachable([parse_address(text) for text in listening]))[:MOST_ADDRESSES]
    used = {name: own for name, text in others.items() if text and (own := towards(parse_address(text)[0]))}
    with ThreadPoolExecutor(MOST_ADDRESSES) as pool:
        heard = pool.submit(hears_itself, asked)
        walls = pool.submit(firewalls)
        nat = pool.submit(behind_nat)
        troubles = dict(zip(tried, pool.map(_trouble, tried), strict=True))
        return Surroundings(
            system=system(),
            behind_nat=nat.result(),
            addresses=addresses,
            firewalls=walls.result(),
            multicast=heard.result(),
            tried=tried,
            closed={text: trouble for text, trouble in troubles.items() if trouble},
            used=used,
        )


def system() -> System:
    if sys.platform == "darwin":
        return "macos"
    if sys.platform != "linux":
        return "other"
    return "wsl2" if "microsoft" in platform.release().lower() else "linux"


def behind_nat() -> bool:
    """Whether Windows translates this machine's addresses, as it does for WSL2 unless networking is mirrored."""
    return system() == "wsl2" and "mirrored" not in _says("wslinfo", "--networking-mode")


def firewalls(root: Path = Path("/")) -> tuple[Firewall, ...]:
    """Those that are on, as far as anybody may see that."""
    found: list[Firewall] = []
    if "ENABLED=yes" in _text(root / "etc/ufw/ufw.conf"):
        found.append("ufw")
    if any(
        (root / path).exists() for path in ("run/firewalld.pid", "var/run/firewalld.pid", "run/firewalld")
    ):
        found.append("firewalld")
    if system() == "macos":
        tool = "/usr/libexec/ApplicationFirewall/socketfilterfw"
        if "enabled" in _says(tool, "--getglobalstate"):
            found.append("macos")
    return tuple(found)


def _trouble(text: str) -> str:
    """Why nobody answers at an own address; "" if somebody does."""
    try:
        with socket.create_connection(parse_address(text), OWN_CONNECT_S):
            return ""
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return error.strerror or str(error)


def _says(*command: str) -> str:
    """What a tool of the system prints; "" if it is not there, or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=SYSTEM_TOOL_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout[:4096].decode("utf-8", "replace").lower()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
