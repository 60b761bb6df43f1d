"""Addresses: which ones may be listened at or connected to, and how to listen so that no other user can connect.

    ipc:///absolute/path.sock    this user only: directory 0700, socket 0600
    tcp://127.0.0.1:5555         loopback needs no keys
    tcp://192.168.1.5:5555       every other address is refused without CURVE keys

Knows address syntax, permissions and CURVE options. Does not know what is said over a socket.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from .curve_keys import ZAP_DOMAIN, ClientKeys, KeyPair, ServerKeys
from .errors import AddressError, cannot_listen

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
    raise AddressError(f"`address={address[:200]}`: must begin with ipc:// or tcp://")


def _parse_ipc(address: str, rest: str) -> IpcAddress:
    if not rest.startswith("/") or "\0" in rest:
        raise AddressError(f"`address={address[:200]}`: must hold an absolute path, as ipc:///run/x.sock")
    size = len(os.fsencode(rest))
    if size > SOCKET_PATH_BYTES:
        raise AddressError(f"socket path of {size} bytes: must be at most {SOCKET_PATH_BYTES}: {rest[:60]}…")
    return IpcAddress(Path(rest))


def _parse_tcp(address: str, rest: str) -> TcpAddress:
    match = _HOST_PORT.fullmatch(rest)
    if match is None:
        raise AddressError(f"`address={address[:200]}`: must be tcp://HOST:PORT, IPv6 in brackets")
    port = 0 if match["port"] == "*" else int(match["port"])
    if port > 65535:
        raise AddressError(f"`address={address[:200]}`: the port must be from 0 to 65535")
    host = match["host"].removeprefix("[").removesuffix("]")
    if host == "localhost":
        host = "127.0.0.1"
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        if match["host"].startswith("["):
            raise AddressError(
                f"`address={address[:200]}`: what is in brackets must be an IPv6 address"
            ) from None
        return TcpAddress(host, port, loopback=False)
    return TcpAddress(str(ip), port, ip.is_loopback)


def listen(address: str, *, keyed: bool = False) -> socket.socket:
    """A socket that listens there. `keyed`: whoever speaks over it uses CURVE keys, so it may be reached from anywhere.

    AddressError when the address is refused or taken, or is not one of this machine's.
    """
    target = parse(address)
    if isinstance(target, IpcAddress):
        claim_directory(target.path.parent)
        family = socket.AF_UNIX
        place: str | tuple[str, int] = str(target.path)
    elif keyed or target.loopback:
        family = socket.AF_INET6 if ":" in target.host else socket.AF_INET
        place = ("" if target.host == "*" else target.host, target.port)
    else:
        remedy = "authorise a client's CURVE key (Security in docs/api.md)"
        raise AddressError(_in_plain_text("listen at", target, remedy))
    public = socket.socket(family, socket.SOCK_STREAM)
    # With a chmod after bind(2), the socket would be open to others for a moment. TCP ignores the umask.
    mask = os.umask(0o177)
    try:
        if family != socket.AF_UNIX:
            public.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        public.bind(place)
        public.listen(1024)
    except OSError as error:
        public.close()
        raise cannot_listen(str(target), error) from error
    finally:
        os.umask(mask)
    return public


def address_of(public: socket.socket) -> str:
    """Where a socket of `listen` can be reached, with its real port."""
    place = public.getsockname()
    if isinstance(place, str):
        return f"ipc://{place}"
    return str(TcpAddress(place[0], place[1], loopback=False))


def require_keys(router: Socket, keys: ServerKeys) -> None:
    """Have a socket admit only clients with an authorised key. The caller holds `curve_keys.gate` open."""
    _give_pair(router, keys.pair)
    router.curve_server = 1
    router.zap_domain = ZAP_DOMAIN
    router.zap_enforce_domain = 1  # without a gate nobody is admitted


def connect(dealer: Socket, address: str, keys: ClientKeys | None = None) -> None:
    """Begin to connect; the socket's monitor tells how that went. AddressError when the address is refused."""
    target = parse(address)
    if isinstance(target, TcpAddress):
        if target.port == 0 or target.host == "*":
            raise AddressError(f"`address={address[:200]}`: must name a host and a port to connect to")
        if keys is not None:
            _give_pair(dealer, keys.pair)
            dealer.curve_serverkey = keys.server.encode()
        elif not target.loopback:
            raise AddressError(_in_plain_text("send prompts to", target, "give CURVE keys"))
        dealer.ipv6 = True
    try:
        dealer.connect(str(target))
    except zmq.ZMQError as error:
        raise AddressError(f"cannot connect to {target}: {error.strerror}") from error


def set_heartbeat(peer: Socket, interval_ms: int) -> None:
    """Ping the other side at this interval. A connection that is silent for three intervals is dead."""
    peer.heartbeat_ivl = interval_ms
    peer.heartbeat_timeout = peer.heartbeat_ttl = 3 * interval_ms


def _give_pair(peer: Socket, pair: KeyPair) -> None:
    peer.curve_publickey = pair.public.encode()
    peer.curve_secretkey = pair.secret.encode()


def _in_plain_text(action: str, target: TcpAddress, remedy: str) -> str:
    return (
        f"will not {action} {target} in plain text: only 127.0.0.0/8, [::1] and localhost go "
        f"without keys; {remedy} or use ipc://"
    )


def claim_directory(path: Path) -> None:
    """Create the directory `path` for this user alone. AddressError when others own it or may write to it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
    except OSError as error:
        raise AddressError(f"cannot create {path}: {error.strerror}") from error
    if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o022:
        raise AddressError(f"{path}: must belong to this user and be writable by nobody else (chmod 700 it)")
