"""Hosts, networks and relays on this machine, all gone at the end, even if the end is a kill.

    with Lab() as lab:
        head, one = lab.host("head"), lab.host("one", Limits(memory_bytes=1 << 30))
        head.serve()
        one.join(head)

A process of its own waits for the end of this one and then removes everything; so there is one way to clean up. What
it left because it was killed as well is removed when the next lab is made.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from hosts import network
from hosts.host import PORT, Host, HostFailed
from hosts.limits import UNLIMITED, HostCgroup, Limits, disk_of, names
from hosts.network import Cable, Network, NetworkError

MARK = "shoalhost"  # what every name begins with; then comes the number of the process to which it belongs
PROBE = "probe"
_labs = count(1)


class Relay:
    """Between a host and the head's network. `set` changes what passes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._answer()

    def set(self, **values: float | bool) -> None:
        """`delay_s`, `jitter_s`, `bytes_per_s` and `cut`, as the relay has them."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(values) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout
        if self._process.stdout.readline().strip() != "ok":
            raise NetworkError("a relay has ended")


class Lab:
    """`lan` is the network that all hosts are in, unless they are told otherwise. Raises NetworkError, OSError."""

    def __init__(self, root: Path | None = None) -> None:
        self.name = f"{MARK}-{os.getpid()}-{next(_labs)}"
        self.root = root or Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self.hosts: list[Host] = []
        self._networks: list[Network] = []
        self._janitor: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Lab:
        sweep_leftovers()
        self._janitor = subprocess.Popen(
            [sys.executable, __file__, self.name, str(self.root)],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.lan = self.network()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for host in self.hosts:
                print(f"--- {host.name}\n{host.log()}", file=sys.stderr)
        assert self._janitor is not None
        assert self._janitor.stdin is not None
        self._janitor.stdin.close()
        self._janitor.wait()

    def network(self) -> Network:
        made = Network(f"{self.name}-net{len(self._networks)}", 77 + len(self._networks))
        made.make()
        self._networks.append(made)
        return made

    def host(
        self,
        name: str,
        limits: Limits = UNLIMITED,
        *,
        lan: bool = True,
        bytes_per_s: float = 0,
        **more: Any,
    ) -> Host:
        """A new host. `bytes_per_s` is what its cable carries; `more` are fields of `Host`."""
        namespace = f"{self.name}-{name}"
        root = self.root / name
        root.mkdir(parents=True)
        network.make_host(namespace)
        cgroup = HostCgroup(namespace)
        cgroup.make(limits, disk_of(root))
        host = Host(name, namespace, root, cgroup, **more)
        self.hosts.append(host)
        if lan:
            self.plug(host, bytes_per_s=bytes_per_s)
        return host

    def plug(self, host: Host, into: Network | None = None, *, bytes_per_s: float = 0) -> Cable:
        """One more cable of the host."""
        place = self.hosts.index(host) + 1
        cable = (into or self.lan).attach(host.namespace, f"eth{len(host.cables)}", place, bytes_per_s)
        host.cables.append(cable)
        return cable

    def relayed(
        self, name: str, head: Host, limits: Limits = UNLIMITED, *, bytes_per_s: float = 0, **more: Any
    ) -> tuple[Host, Relay]:
        """A host in a network of its own, and the relay through which alone it reaches the head."""
        own = self.network()
        host = self.host(name, limits, lan=False, **more)
        self.plug(host, own, bytes_per_s=bytes_per_s)
        between = self.host(f"{name}-relay", Limits(weight=limits.weight))
        self.plug(between, own)
        target = f"{self.lan.address(self.hosts.index(head) + 1)}:{PORT}"
        host.join_at = f"{own.address(self.hosts.index(between) + 1)}:{PORT}"
        command, environment = between.command(
            sys.executable, str(Path(__file__).with_name("relay.py")), host.join_at, target
        )
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        return host, Relay(process)


def missing() -> str:
    """Why there can be no hosts here; empty if there can be."""
    if sys.platform != "linux" or os.geteuid():
        return "hosts as network namespaces want Linux and root"
    try:
        with Lab() as lab:
            lab.host(PROBE, Limits(processor_time=1.0, memory_bytes=1 << 30), bytes_per_s=1e6).run("true")
    except (OSError, NetworkError, HostFailed) as error:
        return f"no hosts can be made here: {error}"
    return ""


def sweep_leftovers() -> None:
    """Remove what belongs to processes that are gone."""
    found = {*network.namespaces(), *names(MARK)}
    for owner in {name.split("-")[1] for name in found if name.startswith(f"{MARK}-")}:
        if not Path(f"/proc/{owner}").exists():
            sweep(f"{MARK}-{owner}")


def sweep(name: str) -> None:
    """Remove all hosts and networks whose names begin so."""
    for cgroup in names(f"{name}-"):
        HostCgroup(cgroup).remove()
    for namespace in network.namespaces():
        if namespace.startswith(f"{name}-"):
            with suppress(NetworkError):
                network.remove(namespace)


if __name__ == "__main__":
    sys.stdin.read()
    sweep(sys.argv[1])
    shutil.rmtree(sys.argv[2], ignore_errors=True)
