"""Two machines, as network namespaces with a slow link that is listed first, a fast one and decoys: the fast one is
used, and only it listens. Run by `make test-cluster`, as root, where there is iproute2.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fakes.group.clusters import wait_for

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"),
        reason="needs root and iproute2",
    ),
]

# name of the interface → network, and what a second lets through
LINKS = {
    "wlan0": ("10.71.0", "20mbit"),
    "docker0": ("10.72.0", ""),
    "tun0": ("10.73.0", ""),
    "eth0": ("10.74.0", ""),
}
PORT = 7447


class Hosts:
    """`head` and `worker`, each a namespace with an end of every link."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names = {name: f"shoal-{os.getpid()}-{name}" for name in ("head", "worker")}
        self._pids: list[int] = []
        try:
            for name in self._names.values():
                self._ip("netns", "add", name)
                self._ip("-n", name, "link", "set", "lo", "up")
            for number, (link, (network, rate)) in enumerate(LINKS.items()):
                ends = [f"s{os.getpid() % 100000}{number}{end}" for end in "hw"]
                self._ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
                for place, (end, name) in enumerate(zip(ends, self._names.values(), strict=True), 1):
                    self._ip("link", "set", end, "netns", name, "name", link)
                    self._ip("-n", name, "address", "add", f"{network}.{place}/24", "dev", link)
                    self._ip("-n", name, "link", "set", link, "up")
                    if rate:
                        shaped = ("root", "tbf", "rate", rate, "burst", "32kbit", "latency", "50ms")
                        self._run("tc", "-n", name, "qdisc", "add", "dev", link, *shaped)
        except BaseException:
            self.close()
            raise

    def shoal(self, name: str, *arguments: str) -> str:
        command = (sys.executable, "-P", "-m", "shoal.cli.main", *arguments)
        done = subprocess.run(
            ["ip", "netns", "exec", self._names[name], *command],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"SHOAL_HOME": str(self._directory / name)},
        )
        assert not done.returncode, done.stderr
        if found := re.search(r"\(pid (\d+)\)", done.stderr):
            self._pids.append(int(found[1]))
        return done.stdout

    def nodes(self) -> dict[str, object]:
        return json.loads(self.shoal("head", "cluster", "nodes", "--json"))  # type: ignore[no-any-return]

    def listening(self) -> set[str]:
        """Hosts at which something listens at the port, as the system says."""
        found = self._run("ip", "netns", "exec", self._names["head"], "ss", "-Hltn")
        places = [line.split()[3].rpartition(":") for line in found.splitlines()]
        return {host for host, _, port in places if port == str(PORT)}

    def link(self, name: str, state: str) -> None:
        self._ip("-n", self._names["head"], "link", "set", name, state)

    def new_link(self) -> None:
        """Another fast way between the two."""
        self._ip("link", "add", f"s{os.getpid()}x", "type", "veth", "peer", "name", f"s{os.getpid()}y")
        for end, (place, name) in zip("xy", enumerate(self._names.values(), 1), strict=True):
            self._ip("link", "set", f"s{os.getpid()}{end}", "netns", name, "name", "eth1")
            self._ip("-n", name, "address", "add", f"10.75.0.{place}/24", "dev", "eth1")
            self._ip("-n", name, "link", "set", "eth1", "up")

    def close(self) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for name in self._names.values():
            with suppress(subprocess.CalledProcessError):
                self._ip("netns", "delete", name)

    def _ip(self, *arguments: str) -> None:
        self._run("ip", *arguments)

    def _run(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    made.close()


def test_the_fast_one_is_used_and_only_it_listens(hosts: Hosts) -> None:
    made = json.loads(hosts.shoal("head", "cluster", "init", "--json"))
    assert hosts.listening() == {"10.71.0.1", "10.74.0.1"}
    slow = ("--address", f"10.71.0.1:{PORT}")
    hosts.shoal("worker", "cluster", "join", made["code"], *slow, "--threads", "1", "--detach")

    def attached_at(host: str) -> bool:
        return any(node["attached"] and node["address"] == host for node in hosts.nodes()["nodes"][1:])  # type: ignore[index]

    wait_for(lambda: attached_at("10.74.0.2"), 60)
    wait_for(lambda: hosts.listening() == {"10.74.0.1"}, 20)
    assert hosts.nodes()["closed"] == [f"10.71.0.1:{PORT}"]

    hosts.new_link()
    hosts.shoal("head", "cluster", "test")  # a second or two
    assert hosts.listening() == {"10.74.0.1"}
    assert attached_at("10.74.0.2")

    hosts.link("eth0", "down")  # the cable is pulled
    wait_for(lambda: attached_at("10.75.0.2"), 60)
    wait_for(lambda: hosts.listening() == {"10.75.0.1"}, 20)
