"""Network namespaces, the bridge that joins them, and the cables between: what `ip` and `tc` do, in a few words.

A network is a namespace of its own with a bridge in it, so the machine's own network is never touched. Wants root.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

BURST_BYTES = 64 << 10  # that pass a limited cable at once: a few packets
QUEUE_MS = 100  # that a limited cable holds


class NetworkError(Exception):
    """The kernel or its tools cannot do it."""


def ip(*arguments: str, inside: str = "") -> str:
    """`inside`: the namespace where it is done. Raises NetworkError."""
    return _run("ip", *(("-n", inside) if inside else ()), *arguments)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError as error:
        raise NetworkError(f"{command[0]} is missing: apt install iproute2") from error
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Network:
    """A bridge in a namespace. Hosts have addresses 10.NUMBER.0.x and fd00:NUMBER::x."""

    namespace: str
    number: int

    def make(self) -> None:
        ip("netns", "add", self.namespace)
        ip("link", "add", "bridge", "type", "bridge", inside=self.namespace)
        ip("link", "set", "bridge", "up", inside=self.namespace)

    def address(self, host: int) -> str:
        return f"10.{self.number}.0.{host}"

    @property
    def prefixes(self) -> tuple[str, str]:
        """How its addresses begin."""
        return f"10.{self.number}.0.", f"fd00:{self.number}::"

    def attach(self, namespace: str, interface: str, host: int, bytes_per_s: float = 0) -> Cable:
        """A cable from a host, which gets an address."""
        port = f"p{host}"
        ip("link", "add", port, "type", "veth", "peer", interface, "netns", namespace, inside=self.namespace)
        ip("link", "set", port, "master", "bridge", "up", inside=self.namespace)
        ip("addr", "add", f"{self.address(host)}/24", "dev", interface, inside=namespace)
        ip("addr", "add", f"fd00:{self.number}::{host}/64", "dev", interface, "nodad", inside=namespace)
        cable = Cable(namespace, interface, self.namespace, port)
        cable.up()
        if bytes_per_s:
            cable.limit(bytes_per_s)
        return cable


@dataclass(frozen=True)
class Cable:
    """Between a host's interface and a port of a bridge."""

    host: str
    interface: str
    network: str
    port: str

    def down(self) -> None:
        """At the host, which knows that it has no network."""
        ip("link", "set", self.interface, "down", inside=self.host)

    def up(self) -> None:
        ip("link", "set", self.interface, "up", inside=self.host)

    def unplug(self) -> None:
        """At the bridge: the host's interface loses its carrier, as with a real cable."""
        ip("link", "set", self.port, "down", inside=self.network)

    def replug(self) -> None:
        ip("link", "set", self.port, "up", inside=self.network)

    def limit(self, bytes_per_s: float) -> None:
        """Both directions."""
        for namespace, device in ((self.host, self.interface), (self.network, self.port)):
            rate = (
                "rate",
                f"{int(bytes_per_s * 8)}bit",
                "burst",
                f"{BURST_BYTES}",
                "latency",
                f"{QUEUE_MS}ms",
            )
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *rate)


def make_host(namespace: str) -> None:
    ip("netns", "add", namespace)
    ip("link", "set", "lo", "up", inside=namespace)


def namespaces() -> list[str]:
    return [line.split()[0] for line in ip("netns", "list").splitlines()]


def remove(namespace: str) -> None:
    ip("netns", "del", namespace)
