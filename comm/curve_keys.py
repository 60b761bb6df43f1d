"""CURVE keys: who this machine is, and which clients may talk to its daemon over TCP.

    <keys>/server.key, client.key   two lines: public, secret (Z85, 40 characters each); mode 0600
    <keys>/authorised               one client per line: name, public key

Knows files and their permissions, and the gate that ZeroMQ asks at every handshake (ZAP, RFC 27).
Does not know addresses, nor where the directory is.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from . import key_files
from .errors import KeyFileError
from .log_rate import SeldomLog

Z85_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
ZAP_DOMAIN = b"shoal"

log = logging.getLogger("shoal.keys")
_seldom = SeldomLog(log)  # anybody can connect, and each time the files are read


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair. Each half is 40 characters of Z85."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class ServerKeys:
    """What a daemon needs to listen over TCP: its own pair, and the ring that says which clients may connect."""

    pair: KeyPair
    ring: KeyRing


@dataclass(frozen=True)
class ClientKeys:
    """What a client needs to connect over TCP: its own pair, and the public key that the daemon must have."""

    pair: KeyPair
    server: str

    def __post_init__(self) -> None:
        check_key(self.server, "server public key")


def check_key(text: str, what: str) -> str:
    """`text`, if it is a key. KeyFileError, naming `what` it is, otherwise."""
    if not Z85_KEY.fullmatch(text):
        raise KeyFileError(f"{what} of {len(text)} characters: must be 40 characters of Z85")
    return text


@dataclass(frozen=True)
class KeyRing:
    """The key files in one directory (0700, made when first written to). All methods raise KeyFileError."""

    directory: Path

    def server(self) -> KeyPair:
        """The daemon's key pair, made at the first call."""
        return self._pair(self.directory / "server.key")

    def client(self) -> KeyPair:
        """This user's key pair as a client, made at the first call."""
        return self._pair(self.directory / "client.key")

    def server_keys(self) -> ServerKeys:
        return ServerKeys(self.server(), self)

    def client_keys(self, server: str) -> ClientKeys:
        return ClientKeys(self.client(), server)

    def authorised(self) -> dict[str, str]:
        """Name → public key of every client that may connect. Read anew each time, so changes hold at once."""
        path = self.directory / "authorised"
        if not path.exists():
            return {}
        entries: dict[str, str] = {}
        for number, line in enumerate(key_files.read(path).splitlines(), 1):
            name, _, key = line.strip().partition(" ")
            if not NAME.fullmatch(name) or not Z85_KEY.fullmatch(key.strip()):
                raise KeyFileError(f"{path}, line {number}: must be a name and a public key")
            entries[name] = key.strip()
        return entries

    def authorise(self, name: str, public: str) -> None:
        """Let the client with this public key connect, under `name`. Replaces an earlier key of that name."""
        if not NAME.fullmatch(name):
            raise KeyFileError(
                f"{name[:80]!r} is no name of a client: must be 1 to 64 letters, digits or ._@-"
            )
        self._write_authorised(self.authorised() | {name: check_key(public, "public key")})

    def revoke(self, name: str) -> None:
        """Refuse new connections of `name` from now on. Connections that are open stay open."""
        entries = self.authorised()
        if entries.pop(name, None) is None:
            raise KeyFileError(f"no client called {name[:80]!r} is authorised")
        self._write_authorised(entries)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a key may connect. pyzmq's authenticator calls this, by this name."""
        try:
            return key.decode("ascii") in self.authorised().values()
        except (KeyFileError, UnicodeDecodeError) as error:
            _seldom.warning("refusing a client: %s", error)
            return False

    def _write_authorised(self, entries: dict[str, str]) -> None:
        text = "".join(f"{name} {key}\n" for name, key in entries.items())
        with key_files.written(self.directory, text) as fresh:
            fresh.replace(self.directory / "authorised")

    def _pair(self, path: Path) -> KeyPair:
        if not path.exists():
            public, secret = (half.decode("ascii") for half in zmq.curve_keypair())
            # Unlike a rename, a link fails when another process was first; then that process's key counts.
            with (
                key_files.written(self.directory, f"{public}\n{secret}\n") as fresh,
                contextlib.suppress(FileExistsError),
            ):
                path.hardlink_to(fresh)
        lines = key_files.read(path).split()
        if len(lines) != 2:
            raise KeyFileError(f"{path}: must hold a public and a secret key, one a line")
        pair = KeyPair(check_key(lines[0], f"{path}: public key"), check_key(lines[1], f"{path}: secret key"))
        if zmq.curve_public(pair.secret.encode()).decode() != pair.public:
            raise KeyFileError(f"{path}: the public key does not belong to the secret one")
        return pair


def load_server(directory: Path) -> ServerKeys | None:
    """The keys to listen with. None while no client has been authorised, and then TCP stays on loopback."""
    ring = KeyRing(directory)
    return ring.server_keys() if ring.authorised() else None


@contextmanager
def gate(context: zmq.Context[zmq.Socket[bytes]], ring: KeyRing) -> Iterator[None]:
    """Within it, CURVE sockets of `context` in ZAP_DOMAIN admit the ring's authorised clients and nobody else."""
    # It imports asyncio, which takes 50 ms; clients need neither.
    from zmq.auth.thread import ThreadAuthenticator

    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    try:
        authenticator.configure_curve_callback(ZAP_DOMAIN.decode(), ring)
        yield
    finally:
        authenticator.stop()
