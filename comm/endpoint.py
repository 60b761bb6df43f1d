"""Addresses: which ones may be bound or connected to, and how to bind one so that no other user can connect.

    ipc:///absolute/path.sock    this user only: directory 0700, socket 0600
    tcp://127.0.0.1:5555         loopback needs no keys
    tcp://192.168.1.5:5555       every other address is refused without CURVE keys

Knows address syntax, permissions and CURVE options. Does not know what is said over a socket.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from .curve_keys import ZAP_DOMAIN, ClientKeys, ServerKeys
from .errors import AddressError

SOCKET_PATH_BYTES = 103  # sockaddr_un.sun_path: 108 on Linux, 104 on macOS, with the closing zero
_HOST_PORT = re.compile(r"(?P<host>\[[^\[\]]+\]|[A-Za-z0-9._*-]+):(?P<port>\d{1,5}|\*)")

Socket = zmq.Socket[Any]


@dataclass(frozen=True)
class IpcAddress:
    path: Path

    def __str__(self) -> str:
        return f"ipc://{self.path}"


@dataclass(frozen=True)
class TcpAddress:
    """`host` is canonical, so ZeroMQ gets exactly what was checked."""

    host: str
    port: int  # 0 = any free one
    loopback: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port or '*'}"


def parse(address: str) -> IpcAddress | TcpAddress:
    """The address in `address`. AddressError for anything that is not one of the forms above.

    Only literal loopback addresses (and `localhost`, taken as 127.0.0.1) count as loopback: a host name or
    an interface name may resolve to anything.
    """
    if address.startswith("ipc://"):
        return _parse_ipc(address, address.removeprefix("ipc://"))
    if address.startswith("tcp://"):
        return _parse_tcp(address, address.removeprefix("tcp://"))
    raise AddressError(f"address={address[:200]!r}: must begin with ipc:// or tcp://")


def _parse_ipc(address: str, rest: str) -> IpcAddress:
    if not rest.startswith("/") or "\0" in rest:
        raise AddressError(f"address={address[:200]!r}: must hold an absolute path, as ipc:///run/x.sock")
    size = len(os.fsencode(rest))
    if size > SOCKET_PATH_BYTES:
        raise AddressError(f"socket path of {size} bytes: must be at most {SOCKET_PATH_BYTES}: {rest[:60]}…")
    return IpcAddress(Path(rest))


def _parse_tcp(address: str, rest: str) -> TcpAddress:
    match = _HOST_PORT.fullmatch(rest)
    if match is None:
        raise AddressError(f"address={address[:200]!r}: must be tcp://HOST:PORT, IPv6 in brackets")
    port = 0 if match["port"] == "*" else int(match["port"])
    if port > 65535:
        raise AddressError(f"port={port}: must be from 0 to 65535")
    host = match["host"].removeprefix("[").removesuffix("]")
    if host == "localhost":
        host = "127.0.0.1"
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        if match["host"].startswith("["):
            raise AddressError(f"host={host[:60]!r}: must be an IPv6 address") from None
        return TcpAddress(host, port, loopback=False)
    return TcpAddress(str(ip), port, ip.is_loopback)


def bind(socket: Socket, address: str, keys: ServerKeys | None = None) -> str:
    """Bind, and return the real address (with its port). With `keys`, the caller holds `curve_keys.gate` open.

    AddressError when the address is refused or taken, or is not one of this machine's.
    """
    target = parse(address)
    if isinstance(target, IpcAddress):
        claim_directory(target.path.parent)
    else:
        _secure(socket, target, keys, server=True)
        socket.ipv6 = ":" in target.host
    # With a chmod after bind(2), the socket would be open to others for a moment. TCP ignores the umask.
    mask = os.umask(0o177)
    try:
        socket.bind(str(target))
    except zmq.ZMQError as error:
        raise AddressError(f"cannot listen at {target}: {error.strerror}") from error
    finally:
        os.umask(mask)
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))


def connect(socket: Socket, address: str, keys: ClientKeys | None = None) -> None:
    """Begin to connect; the socket's monitor tells how that went. AddressError when the address is refused."""
    target = parse(address)
    if isinstance(target, TcpAddress):
        if target.port == 0 or target.host == "*":
            raise AddressError(f"address={address[:200]!r}: must name a host and a port to connect to")
        _secure(socket, target, keys, server=False)
        socket.ipv6 = True
    try:
        socket.connect(str(target))
    except zmq.ZMQError as error:
        raise AddressError(f"cannot connect to {target}: {error.strerror}") from error


def set_heartbeat(socket: Socket, interval_ms: int) -> None:
    """Ping the other side at this interval. A connection that is silent for three intervals is dead."""
    socket.heartbeat_ivl = interval_ms
    socket.heartbeat_timeout = socket.heartbeat_ttl = 3 * interval_ms


def _secure(
    socket: Socket, target: TcpAddress, keys: ServerKeys | ClientKeys | None, *, server: bool
) -> None:
    if keys is None:
        if target.loopback:
            return
        action = "listen at" if server else "send prompts to"
        remedy = "authorise a client's CURVE key (Security in docs/api.md)" if server else "give CURVE keys"
        raise AddressError(
            f"will not {action} {target} in plain text: only 127.0.0.0/8, [::1] and localhost go "
            f"without keys; {remedy} or use ipc://"
        )
    socket.curve_publickey = keys.pair.public.encode()
    socket.curve_secretkey = keys.pair.secret.encode()
    if isinstance(keys, ServerKeys):
        socket.curve_server = 1
        socket.zap_domain = ZAP_DOMAIN
        socket.zap_enforce_domain = 1  # without a gate nobody is admitted
    else:
        socket.curve_serverkey = keys.server.encode()


def claim_directory(path: Path) -> None:
    """Create the directory `path` for this user alone. AddressError when others own it or may write to it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
    except OSError as error:
        raise AddressError(f"cannot create {path}: {error.strerror}") from error
    if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o022:
        raise AddressError(f"{path}: must belong to this user and be writable by nobody else (chmod 700 it)")
