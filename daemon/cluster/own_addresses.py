"""Addresses of this machine: where to listen, and which of them another machine may reach.

HOST:PORT, [IPV6]:PORT, or :PORT for all interfaces.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from shoal.comm.group.streams import Address
from shoal.daemon.errors import DaemonError

DEFAULT_PORT = 7447
DEFAULT_LISTEN = f":{DEFAULT_PORT}"


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
    found: list[str] = []
    for host, port in listening:
        hosts = own_hosts() if host in ("", "0.0.0.0", "::") else [host]
        found += [spelled((one, port)) for one in hosts]
    return list(dict.fromkeys(found))


def own_hosts() -> list[str]:
    """Addresses of interfaces that are up: those of real links before those of bridges and tunnels, loopback last."""
    import psutil

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    ranked: list[tuple[int, str]] = []
    for name, addresses in psutil.net_if_addrs().items():
        if name not in up:
            continue
        for it in addresses:
            if it.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            plain = it.address.split("%")[0]
            ip = ipaddress.ip_address(plain)
            if ip.is_link_local:
                continue
            ranked.append((_rank(name, ip), plain))
    return [host for _, host in sorted(ranked, key=lambda it: it[0])]


_MADE_UP = (
    "docker",
    "br-",
    "veth",
    "virbr",
    "vmnet",
    "vboxnet",
    "tun",
    "tap",
    "wg",
    "utun",
    "tailscale",
    "zt",
)


def _rank(name: str, ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    if ip.is_loopback:
        return 9
    return (
        (4 if name.startswith(_MADE_UP) else 0)
        + (2 if name.startswith(("wl", "wifi")) else 0)
        + (ip.version == 6)
    )
