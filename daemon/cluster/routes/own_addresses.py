"""Addresses of this machine: where to listen, and which of them another machine may reach.

HOST:PORT, [IPV6]:PORT, or :PORT for all interfaces.  What `auto` is as a HOST, `listening` knows.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from shoal.comm.group.streams import Address
from shoal.daemon.errors import DaemonError

DEFAULT_PORT = 7447

# The best first.
LinkKind = Literal["cable", "wifi", "mobile", "vpn", "bridge", "link-local", "loopback"]


@dataclass(frozen=True)
class OwnAddress:
    """An address of this machine, the interface that has it, and what that is."""

    host: str
    interface: str
    kind: LinkKind

    @property
    def version(self) -> int:
        return 6 if ":" in self.host else 4


def parse_address(text: str, *, with_host: bool = False) -> Address:
    """`with_host`: all interfaces are not meant. Raises DaemonError, which names what is wrong."""
    host, colon, port = text.strip().rpartition(":")
    if not colon or (host.count(":") and not host.startswith("[")):
        host, port = text.strip(), str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise DaemonError("bad_request", f"address {text[:80]!r}: the port must be from 0 to 65535")
    if any(letter.isspace() or not letter.isprintable() for letter in host):
        raise DaemonError("bad_request", f"address {text[:80]!r}: must be HOST:PORT")
    if host.isdigit():  # the system would take it for an address of four bytes
        hint = (
            f"port {host} of HOST is HOST:{host}"
            if with_host
            else f"port {host} of all interfaces is :{host}"
        )
        raise DaemonError("bad_request", f"address {text[:80]!r}: a number is no host", hint)
    if with_host and (not host or not int(port)):
        raise DaemonError("bad_request", f"address {text[:80]!r}: must name a host and its port: HOST:PORT")
    return host, int(port)


def spelled(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable(listening: Sequence[Address]) -> list[str]:
    """How other machines may reach sockets that listen: for those on all interfaces the address of each that is up, the
    likeliest first."""
    found: list[tuple[int, str]] = []
    own = own_addresses()
    for host, port in listening:
        versions = EVERYWHERE.get(host)
        hosts = [one.host for one in own if one.version in versions] if versions else [host]
        found += [(RANKS[_kind_at(one, own)], spelled((one, port))) for one in hosts]
    return list(dict.fromkeys(text for _, text in sorted(found, key=lambda it: it[0])))


def caveat(addresses: Sequence[str]) -> str:
    """One sentence if no other machine of the network can join at these, as HOST:PORT; else ""."""
    own = own_addresses()
    kinds = {_kind_at(parse_address(text)[0], own) for text in addresses}
    if not kinds or not kinds <= _ONLY.keys():
        return ""
    who = " and ".join(_ONLY[kind] for kind in sorted(kinds, key=RANKS.__getitem__))
    better = any(one.kind not in _ONLY for one in own)
    mend = "`listen=auto` lets others in" if better else "it has no address that others reach"
    return f"only {who} can join at {', '.join(addresses)}: {mend}"


def own_addresses() -> list[OwnAddress]:
    """Addresses of interfaces that are up, the best first: of real links, the faster before the slower, before those of
    tunnels and bridges, loopback last; of equal ones IPv4 first."""
    import psutil

    states = psutil.net_if_stats()
    ranked: list[tuple[tuple[int, int, int], OwnAddress]] = []
    for name, addresses in psutil.net_if_addrs().items():
        if name not in states or not states[name].isup:
            continue
        for it in addresses:
            if it.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            ip = ipaddress.ip_address(it.address.split("%")[0])
            if ip.version == 6 and ip.is_link_local:
                continue  # means something together with an interface only, which differs at the other side
            one = OwnAddress(str(ip), name, kind_of(name, ip))
            ranked.append(((RANKS[one.kind], ip.version, -states[name].speed), one))
    return [one for _, one in sorted(ranked, key=lambda it: it[0])]


def kind_of(name: str, ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> LinkKind:
    """What an address of the interface `name` leads over, by what the system says of it and by its name."""
    if ip.is_loopback:
        return "loopback"
    if ip.is_link_local:
        return "link-local"
    said = _system_says(name)
    if said is not None:
        return said
    if any(ip in network for network in _TAILSCALE if network.version == ip.version):
        return "vpn"
    plain = name.lower()
    return next((kind for kind, begins in _NAMES.items() if plain.startswith(begins)), "cable")


def _kind_at(host: str, own: Sequence[OwnAddress]) -> LinkKind:
    """Of an address that may be none of `own`: other addresses of loopback, those that need an interface, names."""
    with suppress(ValueError):
        ip = ipaddress.ip_address(host.split("%")[0])
        if ip.is_loopback or ip.is_link_local:
            return kind_of("", ip)
    return next((one.kind for one in own if one.host == host), "cable")


def towards(host: str) -> OwnAddress | None:
    """The address from which this machine sends to the numeric address `host`; None if there is no way."""
    try:
        ipaddress.ip_address(host)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, DEFAULT_PORT))  # sends nothing
            used = probe.getsockname()[0].split("%")[0]
    except (OSError, ValueError):
        return None
    return next((one for one in own_addresses() if one.host == used), None)


def _system_says(name: str, root: Path = Path("/sys/class/net")) -> LinkKind | None:
    """Linux knows wireless links and tunnels whatever they are called."""
    with suppress(OSError):
        device = (root / name / "uevent").read_text()
        for kind, words in _DEVICE_TYPES.items():
            if any(f"DEVTYPE={word}\n" in device for word in words):
                return kind
        if (root / name / "wireless").exists():
            return "wifi"
        if (root / name / "tun_flags").exists() or (root / name / "type").read_text().strip() in _TUNNELS:
            return "vpn"
    return None


EVERYWHERE = {"": (4, 6), "0.0.0.0": (4,), "::": (6,)}
RANKS: dict[LinkKind, int] = {kind: rank for rank, kind in enumerate(get_args(LinkKind))}
# Who alone reaches an address of these kinds.
_ONLY: dict[LinkKind, str] = {
    "bridge": "containers and virtual machines on this machine",
    "link-local": "machines on the same cable",
    "loopback": "this machine itself",
}
_DEVICE_TYPES: dict[LinkKind, tuple[str, ...]] = {
    "wifi": ("wlan",),
    "mobile": ("wwan",),
    "vpn": ("wireguard", "ppp"),
}
_TUNNELS = ("65534", "512", "768", "769", "776", "778")  # ARPHRD_ of what has no Ethernet below it
_TAILSCALE = (ipaddress.ip_network("100.64.0.0/10"), ipaddress.ip_network("fd7a:115c:a1e0::/48"))
_NAMES: dict[LinkKind, tuple[str, ...]] = {
    "bridge": (
        *("docker", "br-", "veth", "virbr", "vnet", "vmnet", "vmenet", "vboxnet", "vethernet", "bridge1"),
        *(
            "podman",
            "cni",
            "flannel",
            "cali",
            "cilium",
            "lxc",
            "lxd",
            "incus",
            "kube",
            "weave",
            "dummy",
            "ifb",
        ),
    ),
    "vpn": (
        *("tun", "tap", "utun", "wg", "tailscale", "zt", "ppp", "ipsec", "vti", "gre", "vpn", "wt", "nebula"),
        *("nordlynx", "proton", "mullvad", "cscotun", "gpd", "ham", "warp", "cloudflarewarp", "netbird"),
    ),
    "mobile": ("wwan", "wwp", "wwx", "rmnet"),
    "wifi": ("wl", "wifi", "ath", "awdl", "llw"),
}
